"""The command `mor`: one verb per use.

Each verb is a module with `EXAMPLES` and `run(args)`, which returns the exit status; it is
imported only when it is used, so that `mor --help` is quick.
"""

import importlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mor.errors import MorError, nearest
from mor.terminal.console import err_console, fail

VERBS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "demo": ("mor.cli.demo", "train an MoR model and its plain twin, and compare them"),
        "data": ("mor.cli.data", "turn text into tokenized shards"),
        "train": ("mor.cli.train", "pre-train a model, or continue"),
        "experiment": ("mor.cli.experiment", "a grid of trainings, one table and one plot"),
        "report": ("mor.cli.report", "curves of training runs, laid over each other on one page"),
        "generate": ("mor.cli.generate", "continue a prompt, colored by recursion count"),
        "serve": ("mor.cli.serve", "an OpenAI-compatible server"),
        "chat": ("mor.cli.chat", "talk with a model, or with one behind a server"),
        "eval": ("mor.cli.eval", "loss under both selection rules, depth histogram"),
        "convert": ("mor.cli.convert", "checkpoints of other programs in, ours out"),
        "push": ("mor.cli.push", "upload a model to Hugging Face's hub"),
        "info": ("mor.cli.info", "parameters, FLOPs and KV bytes, next to the vanilla twin"),
        "bench": ("mor.cli.bench.main", "measure against baselines in the same run"),
    }
)


def usage() -> str:
    """Text of `mor --help`."""
    rows = "\n".join(f"  {verb:<11}{what}" for verb, (_, what) in VERBS.items())
    return (
        "usage: mor VERB ...\n\nMixture-of-Recursions language models.\n\nverbs:\n"
        f"{rows}\n\nexamples:\n  mor demo\n  mor train configs/smoke.yaml --out runs/smoke\n"
        "  mor generate runs/smoke --prompt 'def main' --show-depth\n\n"
        "`mor VERB --help` tells more.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status. No user error shows a traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the locale cannot spell is shown escaped
            stream.reconfigure(errors="backslashreplace")
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if args[0] in ("-V", "--version"):
        from mor import __version__

        print(f"mor {__version__}")
        return 0
    verb, rest = args[0], args[1:]
    if verb not in VERBS:
        return fail(f"unknown verb {verb!r}: {nearest(verb, VERBS)}", status=2)
    try:
        status = importlib.import_module(VERBS[verb][0]).run(rest)
        sys.stdout.flush()  # a closed pipe shows here, not at exit
        return status
    except MorError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        err_console().print("interrupted.")
        return 130
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
