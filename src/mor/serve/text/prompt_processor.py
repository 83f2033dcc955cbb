"""`PromptProcessor`: encodes prompts and conversations, and decodes token ids."""

import asyncio
from collections.abc import Sequence

from mor.errors import MorError
from mor.io.tokenizer import Tokenizer
from mor.serve.errors import HTTPError, from_engine_error
from mor.serve.openai.protocol import Message, Prompts
from mor.serve.text.chat_template import ChatTemplate

_MAX_INLINE = 2000
"""Characters that are encoded on the event loop, which takes less than handing a text to another
thread; a longer text goes to one, so that other clients need not wait."""


class PromptProcessor:
    """A model's tokenizer and chat template, either of which may be missing.

    Args:
        max_model_len: tokens of prompt and output together; longer texts are refused unread.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, template: ChatTemplate | None, max_model_len: int
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._max_model_len = max_model_len
        ids = range(tokenizer.vocab_size if tokenizer is not None else 0)
        self._bytes = [tokenizer.token_bytes(i) for i in ids] if tokenizer is not None else []
        self._max_token_bytes = max(map(len, self._bytes), default=0)

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
        """The token ids of each prompt, from any of the four forms that OpenAI's API takes.

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
        """The token ids of a text; an empty text becomes the end-of-text token.

        Raises:
            HTTPError: 400, the text is too long or cannot be encoded.
        """
        self._check_length(text)
        try:
            if len(text) <= _MAX_INLINE:
                ids = self.tokenizer.encode(text)
            else:
                ids = await asyncio.to_thread(self.tokenizer.encode, text)
            return ids or [self.tokenizer.eos_id]
        except MorError as error:
            raise from_engine_error(error) from error

    async def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation, up to the beginning of the model's turn.

        Raises:
            HTTPError: 400, there is no template, or it refuses the conversation.
        """
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
        """The text of token ids; empty without a tokenizer."""
        return self._tokenizer.decode(ids) if self._tokenizer is not None else ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; none for an id that the tokenizer does not know."""
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def token_text(self, token_id: int) -> str:
        """A token as text; `bytes:\\xe7..` where it is only part of a character."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _check_length(self, text: str) -> None:
        """Raise if a text cannot fit, however well it is encoded, before time is spent on it."""
        # A character takes at least a byte, and no token holds more bytes than the longest one.
        minimum = len(text) // max(1, self._max_token_bytes)
        if self._max_token_bytes and minimum > self._max_model_len:
            raise context_length_error(f"at least {minimum}", 0, self._max_model_len)


def context_length_error(prompt: int | str, max_tokens: int, limit: int) -> HTTPError:
    """A 400 for a prompt that does not fit the model.

    Args:
        prompt: its tokens, or words such as "at least 5000".
    """
    return HTTPError(
        400,
        f"the prompt has {prompt} tokens and max_tokens is {max_tokens}; the model takes {limit} "
        "in all: shorten the prompt or ask for fewer tokens.",
        code="context_length_exceeded",
    )
