"""`ChatTemplate`: turns a conversation into the token ids that a model was trained on."""

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
_GUARD = "\ufdd0"
"""A code point that is no character. It is put into what looks like a special token in a message,
so that it can be told from the template's own ones, and taken out before the text is encoded."""


class ChatTemplate:
    """A Jinja template in the form that `transformers` uses.

    Only what the template itself writes becomes special tokens; what looks like one in a message
    stays text, so that a client cannot end a turn or begin another one.

    Args:
        source: the template's text.
        tokens: further variables of the template, such as `eos_token`.

    Raises:
        ConfigError: the template is not valid.
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
        """The template `source`, or without it the one among a tokenizer's files, or None.

        Raises:
            ConfigError: the template or the tokenizer's configuration is not valid.
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
        """The token ids of a conversation, up to the beginning of the model's turn.

        Raises:
            HTTPError: 400, the template refuses the conversation.
        """
        special = tokenizer.special_tokens
        # The longest first, because one may begin with another; (?!) matches nothing.
        names = map(re.escape, sorted(special, key=len, reverse=True))
        pattern = re.compile(f"({'|'.join(names)})" if special else r"(?!)")
        turns = [
            {"role": m.role, "content": pattern.sub(_guard, m.text.replace(_GUARD, ""))}
            for m in messages
        ]
        ids: list[int] = []
        # Splitting at a group keeps what matched: texts and special tokens take turns.
        for part in pattern.split(self.render(turns)):
            known = special.get(part)
            ids += tokenizer.encode(part.replace(_GUARD, "")) if known is None else [known]
        if not ids:
            raise HTTPError(400, "the chat template makes an empty prompt of these messages.")
        return ids

    def render(self, turns: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation, up to the beginning of the model's turn.

        Raises:
            HTTPError: 400, the template refuses the conversation or fails.
        """
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
    """The template itself, or the one called `default` if there are several."""
    if isinstance(templates, list):
        return {t["name"]: t["template"] for t in templates}.get("default")
    return templates if isinstance(templates, str) else None


def _guard(match: re.Match[str]) -> str:
    """A special token's text with the guard after its first character."""
    return match[0][0] + _GUARD + match[0][1:]


def _tojson(value: Any, **options: Any) -> str:
    # Jinja's own escapes what HTML needs, which would change the text.
    return json.dumps(value, ensure_ascii=False, **options)


def _now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _refuse(message: str) -> NoReturn:
    raise HTTPError(400, f"the chat template refuses these messages: {message}", param="messages")
