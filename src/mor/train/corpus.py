"""Text into token shards; `mor.train.shards` describes the files.

The documents are read twice. The first pass finds every unreadable line before any work is done,
trains the tokenizer if one is wanted, and sees which documents to hold out; the second encodes and
writes. At no time is more in memory than the longest document, a batch of text with its tokens, and
the words that the tokenizer learns from.
"""

import hashlib
import re
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mor.errors import ConfigError, DataError
from mor.io.storage import storage_error
from mor.io.tokenizer import TOKENIZER_FILE, Tokenizer
from mor.train.shards import INDEX_FILE, CorpusIndex, ShardWriter
from mor.train.sources import Document, SourceDocuments

_BATCH_CHARACTERS = 2**20  # encoded at a time; the library needs some 100 bytes per token
_BATCH_TEXTS = 2**12
_SEGMENT_CHARACTERS = 2**18  # a longer text is encoded in parts

# Byte-level pre-tokenizers start a new word at white space after a letter or digit, whatever comes
# before and after, so a text cut there has the same tokens.
_CUT = re.compile(r"(?<=[^\W_])\s")
_CORPUS_FILE = re.compile(r"tokenizer\.json|index\.json|(train|valid)-\d{5,}\.(bin|docs\.npy)")


@dataclass(frozen=True)
class CorpusSummary:
    """What a build has written."""

    path: Path
    vocab_size: int
    num_train_documents: int
    num_valid_documents: int
    num_train_tokens: int
    num_valid_tokens: int
    num_shards: int
    num_empty_documents: int
    """Documents without any text, which are left out."""


def build_corpus(
    sources: Sequence[Path],
    out: Path,
    *,
    tokenizer: Path | None = None,
    train_tokenizer: int | None = None,
    valid_fraction: float = 0.01,
    shard_tokens: int = 100_000_000,
    text_field: str = "text",
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CorpusSummary:
    """Tokenises text files into the corpus `out`, which appears whole or not at all.

    Args:
        sources: `.txt`, `.md`, `.rst`, `.py` (one document a file), `.jsonl`, `.jsonl.zst` (one a
            line), and folders, which are searched for such files.
        text_field: the field of a JSON line that holds the text.

    The other arguments, the result and the errors are those of `build_from_documents`.

    Raises:
        DataError: also for a source that cannot be read, with its file, line and cure.
        MissingExtraError: a `.jsonl.zst` needs zstandard.
    """
    return build_from_documents(
        SourceDocuments(sources, text_field=text_field),
        out,
        tokenizer=tokenizer,
        train_tokenizer=train_tokenizer,
        valid_fraction=valid_fraction,
        shard_tokens=shard_tokens,
        seed=seed,
        overwrite=overwrite,
        progress=progress,
    )


def build_from_documents(
    documents: Iterable[Document],
    out: Path,
    *,
    tokenizer: Path | None = None,
    train_tokenizer: int | None = None,
    valid_fraction: float = 0.01,
    shard_tokens: int = 100_000_000,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CorpusSummary:
    """Tokenises documents into the corpus `out`, which appears whole or not at all.

    Args:
        documents: iterated twice; a one-shot iterator is first put into a list.
        out: folder to write. It must not exist, be empty, or hold a corpus to overwrite.
        tokenizer: the `tokenizer.json` to use, or a folder that holds one.
        train_tokenizer: or else the vocabulary size of a tokenizer to train on the documents.
        valid_fraction: share of the documents to hold out, in [0, 1). With two or more documents
            both splits get at least one, unless the share is 0.
        shard_tokens: a shard ends with the document that brings it to so many tokens.
        seed: of the choice of held-out documents, which goes by their names.
        overwrite: replace the corpus in `out`, once the new one is complete.
        progress: called with the numbers of encoded and of all documents, after each batch.

    Raises:
        ConfigError: an option is out of its range.
        DataError: no document has text, the tokenizer cannot be used, or `out` is taken.
        CapacityError: the disk is full; `out` is as it was.
    """
    _check_options(tokenizer, train_tokenizer, valid_fraction, shard_tokens)
    out = Path(out).resolve()
    _check_out(out, overwrite)
    if isinstance(documents, Iterator):
        documents = list(documents)

    held_out = _HeldOut(valid_fraction, seed)
    texts = held_out.survey(documents)
    if train_tokenizer is not None:
        encoder = Tokenizer.train(texts, train_tokenizer)
    else:
        assert tokenizer is not None
        encoder = _load_encoder(tokenizer)
        deque(texts, maxlen=0)  # only to survey
    if not held_out.num_documents:
        raise DataError("no document has text: every one is empty, or there is none.")
    with _staged(out) as folder:
        index = _write_shards(folder, documents, encoder, held_out, shard_tokens, progress)
        (folder / TOKENIZER_FILE).write_text(encoder.to_json(), encoding="utf-8")
        (folder / INDEX_FILE).write_text(index.to_json(), encoding="utf-8")
        _check_out(out, overwrite)  # again: another build may have ended first
    return _summarise(out, index, held_out)


def _check_options(
    tokenizer: Path | None,
    train_tokenizer: int | None,
    valid_fraction: float,
    shard_tokens: int,
) -> None:
    if (tokenizer is None) == (train_tokenizer is None):
        raise ConfigError(
            f"tokenizer: {tokenizer}, train_tokenizer: {train_tokenizer}: give one of the two, "
            "a tokenizer.json to use or the vocabulary size of one to train."
        )
    if not 0 <= valid_fraction < 1:
        raise ConfigError(f"valid_fraction: {valid_fraction} is not in [0, 1).")
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens: {shard_tokens} is not a positive number.")


def _load_encoder(path: Path) -> Tokenizer:
    encoder = Tokenizer.load(path)
    try:
        _ = encoder.eos_id  # here, where it can be said which tokenizer has none
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return encoder


def _check_out(out: Path, overwrite: bool) -> None:
    try:
        names = sorted(path.name for path in out.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise DataError(f"{out}: is not a folder: choose another for the corpus.") from error
    except OSError as error:
        raise storage_error(out, error) from error
    if names and not overwrite:
        raise DataError(
            f"{out}: the folder is not empty: choose another, or set overwrite to replace the "
            "corpus in it."
        )
    for name in names:
        if not _CORPUS_FILE.fullmatch(name):
            raise DataError(
                f"{out}: holds {name}, which is no part of a corpus and would be lost: "
                "choose another folder."
            )


class _HeldOut:
    """Decides which documents go to the `valid` split, after a survey of all of them."""

    def __init__(self, fraction: float, seed: int) -> None:
        self.num_documents = 0
        self.num_empty = 0
        self._fraction = fraction
        self._seed = seed
        # The documents that stand for their split even if the fraction would leave it empty.
        self._lowest: tuple[float, int] = (2.0, -1)  # score and number
        self._highest: tuple[float, int] = (-1.0, -1)

    def survey(self, documents: Iterable[Document]) -> Iterator[str]:
        """Passes on the texts of `documents` and takes note of them."""
        for document in documents:
            if not document.text:
                self.num_empty += 1
                continue
            score = self._score(document)
            if score < self._lowest[0]:
                self._lowest = (score, self.num_documents)
            if score >= self._highest[0]:
                self._highest = (score, self.num_documents)
            self.num_documents += 1
            yield document.text

    def split_of(self, number: int, document: Document) -> str:
        """`train` or `valid`, where `number` counts the documents with text from 0."""
        if self._fraction == 0 or number == self._highest[1]:
            return "train"
        held_out = number == self._lowest[1] or self._score(document) < self._fraction
        return "valid" if held_out else "train"

    def _score(self, document: Document) -> float:
        """Uniform in [0, 1) and the same wherever and whenever the document is seen."""
        name = f"{self._seed}:{document.name}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(name, digest_size=6).digest()) / 2**48


@contextmanager
def _staged(out: Path) -> Generator[Path, None, None]:
    """A new folder beside `out` that takes its place if all goes well, and else disappears."""
    token = secrets.token_hex(4)
    staging = out.with_name(f"{out.name}.tmp-{token}")
    replaced = out.with_name(f"{out.name}.old-{token}")
    try:
        staging.mkdir(parents=True)
        yield staging
        try:
            if out.exists():
                out.replace(replaced)
            staging.replace(out)
        except BaseException:
            if replaced.exists() and not out.exists():
                replaced.replace(out)
            raise
    except OSError as error:
        raise storage_error(out, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_shards(
    folder: Path,
    documents: Iterable[Document],
    encoder: Tokenizer,
    held_out: _HeldOut,
    shard_tokens: int,
    progress: Callable[[int, int], None] | None,
) -> CorpusIndex:
    index = CorpusIndex(encoder.vocab_size, encoder.eos_id, {})
    number = 0
    with (
        ShardWriter(folder, "train", index, shard_tokens) as train,
        ShardWriter(folder, "valid", index, shard_tokens) as valid,
    ):
        writers = {"train": train, "valid": valid}
        for batch in _batched_segments(documents):
            encoded = encoder.encode_batch([segment.text for segment in batch])
            for segment, ids in zip(batch, encoded, strict=True):
                split = held_out.split_of(number, segment.document)
                writers[split].write(ids, ends_document=segment.is_last)
                number += segment.is_last
            if progress is not None:
                progress(number, held_out.num_documents)
    if number != held_out.num_documents:
        raise DataError(
            f"the sources held {held_out.num_documents} documents and then {number}: "
            "build again when nothing changes them."
        )
    return replace(index, splits={"train": tuple(train.shards), "valid": tuple(valid.shards)})


def _summarise(out: Path, index: CorpusIndex, held_out: _HeldOut) -> CorpusSummary:
    train, valid = index.splits["train"], index.splits["valid"]
    return CorpusSummary(
        path=out,
        vocab_size=index.vocab_size,
        num_train_documents=sum(shard.num_documents for shard in train),
        num_valid_documents=sum(shard.num_documents for shard in valid),
        num_train_tokens=sum(shard.num_tokens for shard in train),
        num_valid_tokens=sum(shard.num_tokens for shard in valid),
        num_shards=len(train) + len(valid),
        num_empty_documents=held_out.num_empty,
    )


@dataclass(frozen=True)
class _Segment:
    """A part of a document that is encoded in one go."""

    document: Document
    text: str
    is_last: bool


def _segments(document: Document) -> Iterator[_Segment]:
    start = 0
    while cut := _CUT.search(document.text, start + _SEGMENT_CHARACTERS):
        yield _Segment(document, document.text[start : cut.start()], is_last=False)
        start = cut.start()
    yield _Segment(document, document.text[start:], is_last=True)


def _batched_segments(documents: Iterable[Document]) -> Iterator[list[_Segment]]:
    batch: list[_Segment] = []
    num_characters = 0
    for document in documents:
        if not document.text:
            continue
        for segment in _segments(document):
            batch.append(segment)
            num_characters += len(segment.text)
            if num_characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_TEXTS:
                yield batch
                batch = []
                num_characters = 0
    if batch:
        yield batch
