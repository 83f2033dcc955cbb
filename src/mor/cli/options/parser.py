"""Option parsing that all verbs share: an error is one sentence, and names the nearest option."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import jsonargparse

from mor.errors import nearest
from mor.terminal.console import fail


class Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one sentence, and name the nearest known option."""

    def error(self, message: str, *_: Any, **__: Any) -> NoReturn:  # type: ignore[override]
        """Print what is wrong and leave."""
        text = message.split("\n")[0].removeprefix("error: ").strip()
        marker = "nrecognized arguments: "
        if marker in text:
            name = text.split(marker)[1].split()[0].split("=")[0]
            known = [o for a in self._actions for o in a.option_strings if o.startswith("--")]
            text = f"unexpected argument {name!r}."
            if name.startswith("-"):
                text = f"unknown option {name}: {nearest(name, known)}"
        elif wrong := _WRONG_TYPE.match(message):
            option = wrong["key"].replace("_", "-")
            text = f"--{option}={wrong['value']!r} must be of type {wrong['kind']}."
        raise SystemExit(fail(f"{text}\n  `{self.prog} --help` lists what there is.", status=2))


def parser(verb: str, description: str, examples: Sequence[str]) -> Parser:
    """A verb's parser, with its examples at the end of `--help`."""
    lines = "\n".join(f"  {example}" for example in examples)
    return Parser(
        prog=f"mor {verb}",
        description=description,
        epilog=f"examples:\n{lines}",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


_WRONG_TYPE = re.compile(
    r"""Parser key "(?P<key>[^"]+)":.*?Expected (a )?<class '(?P<kind>\w+)'>"""
    r""".*(Got|Given) value: (?P<value>.*)""",
    re.DOTALL,
)
