"""Token ids into text, as they come; and the texts that end a request."""

from collections.abc import Sequence

from mor.io.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_CHARACTER = 4
"""Bytes of UTF-8, hence tokens, that one character can take."""


class IncrementalDetokenizer:
    """The text of tokens as they come, never half a character; see `Tokenizer.pieces`."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """Starts after the tokens `before`, whose text is whole."""
        self._tokenizer = tokenizer
        # Some decoders treat a first token differently, so new text is told from a difference.
        self._context = list(before[-_MAX_CHARACTER:])
        self._pending: list[int] = []
        self._known = tokenizer.decode(self._context)

    def push(self, token: int) -> str:
        """The text that is whole with this token; "" inside a character."""
        self._pending.append(token)
        text = self._tokenizer.decode([*self._context, *self._pending])
        if text.endswith(_REPLACEMENT):
            return ""
        piece = text[len(self._known) :]
        self._context = self._pending
        self._pending = []
        self._known = self._tokenizer.decode(self._context)
        return piece

    def flush(self) -> str:
        """What is left when no more tokens come, broken characters as U+FFFD."""
        text = self._tokenizer.decode([*self._context, *self._pending])
        self._pending = []
        return text[len(self._known) :]


class StopDetokenizer:
    """The text of one completion, up to the first of its stop texts.

    An end that could become a stop text is held back until it is decided.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), before: Sequence[int] = ()
    ) -> None:
        self.text = ""
        """What is certain so far."""
        self.stopped = False
        """Whether a stop text has come; it is not part of the text."""
        self._pieces = IncrementalDetokenizer(tokenizer, before)
        self._stop = stop
        self._held = ""

    def push(self, token: int) -> str:
        """One more token; the text that is certain now and was not before."""
        return self._release(self._pieces.push(token))

    def flush(self) -> str:
        """No more tokens come: the text that was held back, which may bring a stop text."""
        return "" if self.stopped else self._release(self._pieces.flush(), last=True)

    def _release(self, piece: str, last: bool = False) -> str:
        pending = self._held + piece
        found = [at for stop in self._stop if (at := pending.find(stop)) >= 0]
        if found:
            self.stopped, keep = True, min(found)
        elif last:
            keep = len(pending)
        else:
            keep = len(pending) - max((_overlap(pending, stop) for stop in self._stop), default=0)
        self._held = pending[keep:]
        self.text += pending[:keep]
        return pending[:keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`."""
    max_length = min(len(text), len(stop) - 1)
    return next((n for n in range(max_length, 0, -1) if text.endswith(stop[:n])), 0)
