"""Documents into token ids, in order, by one process or by many: the ids are the same."""

import os
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt

from mor.data.encode_worker import encode, open_encoder
from mor.data.sources import Document
from mor.errors import CapacityError
from mor.io.tokenizer import Tokenizer

_BATCH_CHARACTERS = 2**20  # encoded at a time; the library needs some 100 bytes per token
_BATCH_TEXTS = 2**12
_SEGMENT_CHARACTERS = 2**18  # a longer text is encoded in parts

# Byte-level pre-tokenizers start a new word at white space after a letter or digit, whatever comes
# before and after, so a text cut there has the same tokens.
_CUT = re.compile(r"(?<=[^\W_])\s")
_NO_THREADS = "TOKENIZERS_PARALLELISM"

Ids = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Segment:
    """A part of a document that is encoded in one call."""

    document: Document
    text: str
    is_last: bool
    """Whether the document ends with it."""
    number: int
    """The document's, counting those without text as well."""


def _segments(document: Document, number: int) -> Iterator[Segment]:
    """The document in parts of at least 2**18 characters, cut where no token can span the cut."""
    start = 0
    while cut := _CUT.search(document.text, start + _SEGMENT_CHARACTERS):
        yield Segment(document, document.text[start : cut.start()], False, number)
        start = cut.start()
    yield Segment(document, document.text[start:], True, number)


def batched_segments(documents: Iterable[Document], first: int = 0) -> Iterator[list[Segment]]:
    """Segments of all documents with text, in batches of about 2**20 characters.

    Args:
        first: number of the first document.
    """
    batch: list[Segment] = []
    num_characters = 0
    for number, document in enumerate(documents, start=first):
        if not document.text:
            continue
        for segment in _segments(document, number):
            batch.append(segment)
            num_characters += len(segment.text)
            if num_characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_TEXTS:
                yield batch
                batch = []
                num_characters = 0
    if batch:
        yield batch


def encode_in_order(
    batches: Iterable[list[Segment]], encoder: Tokenizer, workers: int
) -> Iterator[tuple[Segment, Ids]]:
    """Each segment with its token ids, in the order of the segments.

    Args:
        workers: processes that encode; 1: this one, with the library's threads.

    Raises:
        CapacityError: a worker died, which is mostly for want of memory.
    """
    if workers == 1:
        for batch in batches:
            yield from zip(batch, _encode(encoder, batch), strict=True)
        return
    with _pool(encoder, workers) as pool:
        waiting: deque[tuple[list[Segment], Future[list[Ids]]]] = deque()
        try:
            for batch in batches:
                texts = [segment.text for segment in batch]
                waiting.append((batch, pool.submit(encode, texts)))
                # Two batches per worker keep all of them busy, and memory bounded.
                if len(waiting) > 2 * workers:
                    yield from _first_result(waiting)
            while waiting:
                yield from _first_result(waiting)
        except BrokenProcessPool as error:
            raise CapacityError(
                f"one of {workers} workers died, mostly for want of memory: take fewer workers; "
                "the same command goes on where it was."
            ) from error


def _first_result(
    waiting: deque[tuple[list[Segment], Future[list[Ids]]]],
) -> Iterator[tuple[Segment, Ids]]:
    """Take the oldest batch out of `waiting`, and wait for its ids."""
    batch, future = waiting.popleft()
    return zip(batch, future.result(), strict=True)


def _encode(encoder: Tokenizer, batch: list[Segment]) -> list[Ids]:
    encoded = encoder.encode_batch([segment.text for segment in batch])
    return [np.asarray(ids, np.uint32) for ids in encoded]


@contextmanager
def _pool(encoder: Tokenizer, workers: int) -> Generator[ProcessPoolExecutor, None, None]:
    """Context with a pool of processes that each hold the tokenizer and encode with one thread."""
    before = os.environ.get(_NO_THREADS)
    os.environ[_NO_THREADS] = "false"  # inherited when a worker starts
    context = get_context("spawn")  # a fork would copy the threads' locks
    pool = ProcessPoolExecutor(workers, context, open_encoder, (encoder.to_json(),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ[_NO_THREADS]
        else:
            os.environ[_NO_THREADS] = before
