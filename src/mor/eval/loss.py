"""Loss of a model on text: nats per token, perplexity and bits per byte.

Bits per byte do not depend on the tokenizer, so models with different vocabularies can be compared.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mor.data.sources import Document
from mor.errors import ConfigError, DataError
from mor.eval.depth import mean_recursions
from mor.io.tokenizer import Tokenizer
from mor.model.transformer import MoRModel
from mor.train.evaluate import Evaluation, evaluate

Window = npt.NDArray[np.int64]

_BATCH_TOKENS = 8192  # in one forward pass
_ENCODE_CHARACTERS = 2**20  # encoded at a time


@dataclass(frozen=True, kw_only=True)
class TextLoss:
    """Loss on some text under both selection rules."""

    evaluation: Evaluation
    num_bytes: int
    """UTF-8 bytes of the predicted tokens' text; end-of-text tokens have none."""
    num_windows: int

    @property
    def mean_recursions(self) -> float:
        """Mean recursions per token under `threshold`."""
        return mean_recursions(self.evaluation.depth_histogram)

    def bits_per_byte(self, nll: float) -> float:
        """nll * tokens / (ln 2 * bytes), for `nll` nats per token."""
        return nll * self.evaluation.tokens / math.log(2) / max(1, self.num_bytes)

    def as_dict(self) -> dict[str, Any]:
        """All results by name, for JSON."""
        topk, threshold = self.evaluation.nll_topk, self.evaluation.nll_threshold
        return {
            **self.evaluation.as_dict(),
            "perplexity_topk": perplexity(topk),
            "perplexity_threshold": perplexity(threshold),
            "bits_per_byte_topk": self.bits_per_byte(topk),
            "bits_per_byte_threshold": self.bits_per_byte(threshold),
            "mean_recursions": self.mean_recursions,
            "bytes": self.num_bytes,
            "windows": self.num_windows,
        }


def perplexity(nll: float) -> float:
    """exp(nll); infinity where that exceeds a float."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def text_windows(
    tokenizer: Tokenizer, documents: Iterable[Document], sequence_length: int
) -> Iterator[Window]:
    """The windows of T + 1 tokens that `mor data build` would cut these documents into.

    Each is int64 (T + 1,) and starts with the last target of the one before; a document is followed
    by the end-of-text id. Tokens after the last whole window are dropped, but a text that is too
    short for one window becomes a window of its own length.
    """
    if sequence_length < 1:
        raise ConfigError(f"sequence_length={sequence_length} must be at least 1.")
    waiting: list[int] = []
    num_windows = 0
    for ids in _encoded(tokenizer, documents):
        waiting += ids
        start = 0
        while len(waiting) - start > sequence_length:
            yield np.array(waiting[start : start + sequence_length + 1], np.int64)
            num_windows += 1
            start += sequence_length
        del waiting[:start]
    if num_windows == 0 and len(waiting) > 1:
        yield np.array(waiting, np.int64)


def _encoded(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[list[int]]:
    """Token ids of each document that is not empty, with the end-of-text id."""
    eos = tokenizer.eos_id
    texts: list[str] = []
    num_characters = 0
    for document in documents:
        if not document.text:
            continue
        texts.append(document.text)
        num_characters += len(document.text)
        if num_characters >= _ENCODE_CHARACTERS:
            yield from ([*ids, eos] for ids in tokenizer.encode_batch(texts))
            texts, num_characters = list[str](), 0
    yield from ([*ids, eos] for ids in tokenizer.encode_batch(texts))


def batched(windows: Iterable[Window], batch_tokens: int = _BATCH_TOKENS) -> Iterator[Tensor]:
    """Windows of one length as (B, T + 1) batches of about `batch_tokens` tokens."""
    remaining = iter(windows)
    for first in remaining:
        more = islice(remaining, max(1, batch_tokens // len(first)) - 1)
        yield torch.from_numpy(np.stack([first, *more]))


def evaluate_windows(
    model: MoRModel,
    tokenizer: Tokenizer,
    batches: Iterable[Tensor],
    document_end: int | None = None,
) -> TextLoss:
    """Loss on (B, T + 1) batches of windows that follow each other in a text.

    Args:
        document_end: id that ends a document, at which attention stops; None: it spans documents.

    Raises:
        DataError: there are no windows.
    """
    counter = _ByteCounter(tokenizer)
    evaluation = evaluate(model, map(counter.see, batches), document_end)
    return TextLoss(
        evaluation=evaluation, num_bytes=counter.finish(), num_windows=counter.num_windows
    )


class _ByteCounter:
    """Counts the bytes of the text that windows predict, document by document.

    Documents are decoded whole, because a window may begin and end inside a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.num_windows = 0
        self._tokenizer = tokenizer
        self._eos = tokenizer.eos_id
        self._open: list[int] = []  # tokens of a document that has not ended yet
        self._num_bytes = 0

    def see(self, batch: Tensor) -> Tensor:
        """Count a batch's bytes and windows, and return it."""
        self.num_windows += len(batch)
        for token in batch[:, 1:].reshape(-1).tolist():
            if token == self._eos:
                self._close()
            else:
                self._open.append(token)
        return batch

    def finish(self) -> int:
        """Bytes of all batches counted."""
        self._close()
        return self._num_bytes

    def _close(self) -> None:
        if self._open:
            self._num_bytes += len(self._tokenizer.decode(self._open).encode())
            self._open = []


def check_length(model: MoRModel, sequence_length: int) -> None:
    """Raise ConfigError if the model cannot take windows of this length."""
    limit = model.config.max_position_embeddings
    if not 1 <= sequence_length <= limit:
        raise ConfigError(
            f"sequence_length={sequence_length} does not fit this model: it takes 1 to "
            f"max_position_embeddings={limit}."
        )


def check_vocabulary(model: MoRModel, vocab_size: int, where: str) -> None:
    """Raise DataError if text may hold ids that the model does not know."""
    if vocab_size > model.config.vocab_size:
        raise DataError(
            f"{where}: its vocabulary of {vocab_size} is more than the model's vocab_size="
            f"{model.config.vocab_size}: use data made with the model's own tokenizer."
        )
