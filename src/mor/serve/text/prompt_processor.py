"""Between texts and token ids, for requests and for answers."""

import asyncio
from collections.abc import Sequence

from mor.errors import MorError
from mor.io.tokenizer import Tokenizer
from mor.serve.errors import HTTPError, from_engine_error
from mor.serve.openai.protocol import Message, Prompts
from mor.serve.text.chat_template import ChatTemplate

_INLINE = 2000
"""Characters that are encoded on the spot; a longer text goes to another thread."""


class PromptProcessor:
    """A model's tokenizer and chat template, either of which may be missing."""

    def __init__(
        self, tokenizer: Tokenizer | None, template: ChatTemplate | None, max_model_len: int
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._max_model_len = max_model_len
        ids = range(tokenizer.vocab_size if tokenizer is not None else 0)
        self._bytes = [tokenizer.token_bytes(i) for i in ids] if tokenizer is not None else []
        self._max_length = max(map(len, self._bytes), default=0)  # bytes of a token

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            HTTPError: 400, the model has none.
        """
        if self._tokenizer is None:
            message = "the model has no tokenizer.json: give the prompt as token ids."
            raise HTTPError(400, message, param="prompt")
        return self._tokenizer

    async def prompts(self, given: Prompts) -> list[list[int]]:
        """The token ids of one prompt or several.

        Raises:
            HTTPError: 400, a text cannot be encoded, or there is no prompt.
        """
        if isinstance(given, str):
            return [await self.encode(given)]
        texts = [prompt for prompt in given if isinstance(prompt, str)]
        if texts:
            return [await self.encode(text) for text in texts]
        lists = [prompt for prompt in given if isinstance(prompt, list)]
        numbers = [token for token in given if isinstance(token, int)]
        found = lists or ([numbers] if numbers else [])
        if not found:
            raise HTTPError(400, "prompt is empty: give a text or token ids.", param="prompt")
        return found

    async def encode(self, text: str) -> list[int]:
        """Token ids of a text; the end of text, which starts one as well, for an empty one."""
        self._check_length(text)
        try:
            if len(text) <= _INLINE:
                ids = self.tokenizer.encode(text)
            else:
                ids = await asyncio.to_thread(self.tokenizer.encode, text)
            return ids or [self.tokenizer.eos_id]
        except MorError as error:
            raise from_engine_error(error) from error

    async def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the model's turn begins."""
        if self._template is None:
            raise HTTPError(
                400,
                "the model has no chat template: use /v1/completions, or start the server with "
                "--chat-template.",
                param="messages",
            )
        for message in messages:
            self._check_length(message.text)
        return await asyncio.to_thread(self._template.encode, messages, self.tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(ids) if self._tokenizer is not None else ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token."""
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> str:
        """A token as a text; `bytes:\\xe7..` where it is only part of a character."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _check_length(self, text: str) -> None:
        """Refuse a text that cannot fit, before time is spent on it."""
        minimum = len(text) // max(1, self._max_length)
        if self._max_length and minimum > self._max_model_len:
            raise context_length_error(f"at least {minimum}", 0, self._max_model_len)


def context_length_error(prompt: int | str, max_tokens: int, limit: int) -> HTTPError:
    """The error of a prompt that does not fit the model."""
    return HTTPError(
        400,
        f"the prompt has {prompt} tokens and max_tokens is {max_tokens}; the model takes {limit} "
        "in all: shorten the prompt or ask for fewer tokens.",
        code="context_length_exceeded",
    )
