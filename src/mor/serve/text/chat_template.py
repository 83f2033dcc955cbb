"""Chat templates: a conversation as the text that a model was trained on, and its token ids."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mor.errors import ConfigError
from mor.io.tokenizer import TOKENIZER_CONFIG, Tokenizer
from mor.serve.errors import HTTPError
from mor.serve.openai.protocol import Message

_TEMPLATE = "chat_template.jinja"
_GUARD = "\ufdd0"  # no character: marks what a user wrote, and is gone before anybody reads it


class ChatTemplate:
    """A Jinja template in the form that `transformers` uses.

    Special tokens are those that the template writes; what looks like one in a message is text.

    Args:
        source: the template.
        tokens: further variables of it, such as `eos_token`.

    Raises:
        ConfigError: it is not valid.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        variables = {"raise_exception": _refuse, "strftime_now": _now, **tokens}
        try:
            self._template = environment.from_string(source, variables)
        except TemplateError as error:
            raise ConfigError(f"the chat template is not valid: {error}.") from error

    @classmethod
    def of(cls, files: Mapping[str, str], source: str | None = None) -> "ChatTemplate | None":
        """The template among the files beside a tokenizer, or another one; None if there is none.

        Raises:
            ConfigError: it cannot be used.
        """
        try:
            values = dict(json.loads(files.get(TOKENIZER_CONFIG, "{}")))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{TOKENIZER_CONFIG} cannot be read: {error}.") from error
        source = files.get(_TEMPLATE) if source is None else source
        source = source if source is not None else _named(values.get("chat_template"))
        tokens = {
            name: str(value["content"] if isinstance(value, dict) else value)
            for name, value in values.items()
            if name in ("bos_token", "eos_token", "unk_token", "pad_token") and value is not None
        }
        return None if source is None else cls(source, tokens)

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """The token ids of a conversation, up to where the model's turn begins.

        Raises:
            HTTPError: 400, the template refuses the conversation.
        """
        special = tokenizer.special_tokens
        names = map(re.escape, sorted(special, key=len, reverse=True))
        pattern = re.compile(f"({'|'.join(names)})" if special else r"(?!)")
        turns = [
            {"role": m.role, "content": pattern.sub(_guarded, m.text.replace(_GUARD, ""))}
            for m in messages
        ]
        ids: list[int] = []
        for part in pattern.split(self.render(turns)):
            known = special.get(part)
            ids += tokenizer.encode(part.replace(_GUARD, "")) if known is None else [known]
        if not ids:
            raise HTTPError(400, "the chat template makes an empty prompt of these messages.")
        return ids

    def render(self, turns: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation."""
        try:
            return self._template.render(messages=turns, add_generation_prompt=True)
        except HTTPError:
            raise
        except Exception as error:  # a template is a program: it can fail in any way
            raise HTTPError(
                400,
                f"the chat template cannot write these messages ({type(error).__name__}: {error}).",
                param="messages",
            ) from error


def _named(templates: Any) -> str | None:
    """The default among several templates."""
    if isinstance(templates, list):
        return {t["name"]: t["template"] for t in templates}.get("default")
    return templates if isinstance(templates, str) else None


def _guarded(match: re.Match[str]) -> str:
    return match[0][0] + _GUARD + match[0][1:]


def _tojson(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _refuse(message: str) -> NoReturn:
    raise HTTPError(400, f"the chat template refuses these messages: {message}", param="messages")
