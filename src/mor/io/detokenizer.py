"""The text of tokens as they are generated, and the stop texts that end it."""

from collections.abc import Sequence

from mor.io.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_CHARACTER = 4
"""Bytes of a UTF-8 character at most, hence the most tokens that it can span."""


class IncrementalDetokenizer:
    """The text of tokens as they are generated; a character appears when its last byte has come."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """Start after the tokens `before`, whose text ends with a whole character."""
        self._tokenizer = tokenizer
        # Some decoders drop the blank before a first token: decode new tokens after a few known
        # ones, and take what the text has beyond theirs.
        self._context = list(before[-_MAX_CHARACTER:])
        self._pending: list[int] = []
        self._known = tokenizer.decode(self._context)

    def push(self, token: int) -> str:
        """The text that this token completes; "" inside a character."""
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
        """The text left when no more tokens come; an incomplete character is U+FFFD."""
        text = self._tokenizer.decode([*self._context, *self._pending])
        self._pending = []
        return text[len(self._known) :]


class StopDetokenizer:
    """The text of one completion, up to the first of its stop texts.

    An end that begins a stop text is held back until the next tokens decide.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), before: Sequence[int] = ()
    ) -> None:
        self.text = ""
        """The text so far, without what is held back."""
        self.stopped = False
        """Whether a stop text has come; it is not part of the text."""
        self._pieces = IncrementalDetokenizer(tokenizer, before)
        self._stop = stop
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token; returns the text that it releases, which may be empty."""
        return self._release(self._pieces.push(token))

    def flush(self) -> str:
        """Release the text held back, when no more tokens come; it may contain a stop text."""
        return "" if self.stopped else self._release(self._pieces.flush(), last=True)

    def _release(self, piece: str, last: bool = False) -> str:
        """Add to the text held back, and return what no stop text can begin in."""
        pending = self._held + piece
        # Up to the first stop text; otherwise all but an end that may become one.
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
    """Length of the longest end of `text` that `stop` begins with, `stop` as a whole aside."""
    max_length = min(len(text), len(stop) - 1)
    return next((n for n in range(max_length, 0, -1) if text.endswith(stop[:n])), 0)
