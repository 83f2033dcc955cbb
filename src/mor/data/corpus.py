"""Builds of a corpus: text into token shards, whose files `mor.data.shards` describes.

The documents are read twice. The first pass finds every unreadable line before any work is done,
trains the tokenizer if one is wanted, and sees which documents to hold out; the second encodes and
writes. At no time is more in memory than the longest document, a batch of text with its tokens, and
the words that the tokenizer learns from.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mor.data.build_journal import CORPUS_FOLDER, Journal, open_journal
from mor.data.shards import INDEX_VERSION, CorpusIndex
from mor.data.sources import Document, SourceDocuments
from mor.data.validation_split import ValidationSplit
from mor.data.writer import CorpusWriter, check_out, finish, staged
from mor.errors import ConfigError, DataError
from mor.io.atomic_files import write_file
from mor.io.tokenizer import TOKENIZER_FILE, Tokenizer

_BYTES_PER_WORKER = 2**25  # of sources; less is not worth a process


@dataclass(frozen=True)
class CorpusSummary:
    """Numbers of documents, tokens and shards that a build has written."""

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
    sources: Sequence[Path | str],
    out: Path,
    *,
    tokenizer: Path | None = None,
    train_tokenizer: int | None = None,
    valid_fraction: float = 0.01,
    valid: Sequence[Path | str] = (),
    shard_tokens: int = 100_000_000,
    text_field: str = "text",
    hub_documents: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    workers: int | None = 1,
    progress: Callable[[int, int], None] | None = None,
) -> CorpusSummary:
    """Tokenize files into the corpus `out`, which appears whole or not at all.

    A build that is cut off leaves `out.partial`, from which the same call goes on. Arguments that
    are not listed are those of `build_from_documents`.

    Args:
        sources: text files (one document each), `.jsonl`, `.jsonl.zst`, `.parquet`, folders of
            them, datasets saved in a folder, and `hf:OWNER/NAME:CONFIG@SPLIT` on the hub.
        valid: sources to hold out as a whole, in place of a share of the documents.
        text_field: the field of a JSON line, or the column, that holds the text.
        hub_documents: the most documents to take of a dataset on the hub; None: all.
        workers: processes that encode; None: one per core, fewer for little text.

    Raises:
        DataError: a source cannot be read (with file, line or row), or another build is going on.
        MissingExtraError: `.jsonl.zst` needs zstandard, tables need pyarrow or datasets.
    """
    _check_options(tokenizer, train_tokenizer, valid_fraction, shard_tokens)
    _check_positive(workers=workers, hub_documents=hub_documents)
    out = Path(out).resolve()
    check_out(out, overwrite)
    documents = SourceDocuments(
        sources, text_field=text_field, valid=valid, hub_documents=hub_documents
    )
    validation_split = ValidationSplit(0.0 if valid else valid_fraction, seed)
    encoder = None if tokenizer is None else _load_encoder(tokenizer)
    # All that the corpus depends on: another plan starts the build anew.
    tokenizer_id = train_tokenizer if encoder is None else _digest(encoder)
    plan = [tokenizer_id, valid_fraction, seed, shard_tokens, text_field, documents.plan()]
    with open_journal(out, [INDEX_VERSION, *plan]) as journal:
        encoder = _prepare(journal, documents, validation_split, encoder, train_tokenizer)
        writer = CorpusWriter(
            folder=journal.folder / CORPUS_FOLDER,
            read=documents.after,
            encoder=encoder,
            validation_split=validation_split,
            shard_tokens=shard_tokens,
            workers=workers or _workers_for(documents),
            progress=progress,
            journal=journal,
        )
        index = writer.run()
        finish(writer.folder, index, out, overwrite)
    return _summarize(out, index, validation_split)


def _prepare(
    journal: Journal,
    documents: SourceDocuments,
    validation_split: ValidationSplit,
    encoder: Tokenizer | None,
    train_tokenizer: int | None,
) -> Tokenizer:
    """The tokenizer, after all that comes before the second pass.

    Datasets on the hub are fetched; documents are surveyed, unless the journal has the survey.
    """
    if documents.on_hub:
        journal.record("fetching", documents.on_hub)
        documents.fetch(journal.folder / "hub")
    folder = journal.folder / CORPUS_FOLDER
    folder.mkdir(exist_ok=True)
    if "survey" in journal.entries:
        found = journal.entries["survey"]
        validation_split.restore(found)
        documents.counts = list(found["counts"])
        return Tokenizer.load(folder)
    encoder = _survey(documents, validation_split, encoder, train_tokenizer)
    write_file(folder / TOKENIZER_FILE, encoder.to_json().encode())
    journal.record("survey", validation_split.state() | {"counts": documents.counts})
    return encoder


def _workers_for(documents: SourceDocuments) -> int:
    """Number of workers: one per core, but at most one per 2**25 bytes of sources."""
    size = sum(file.path.stat().st_size for file in documents.files)
    return max(1, min(os.cpu_count() or 1, size // _BYTES_PER_WORKER))


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
    """Tokenize documents into the corpus `out`, which appears whole or not at all.

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
    check_out(out, overwrite)
    if isinstance(documents, Iterator):
        documents = list(documents)

    validation_split = ValidationSplit(valid_fraction, seed)
    encoder = None if tokenizer is None else _load_encoder(tokenizer)
    encoder = _survey(documents, validation_split, encoder, train_tokenizer)
    with staged(out) as folder:
        writer = CorpusWriter(
            folder=folder,
            read=lambda number: documents,
            encoder=encoder,
            validation_split=validation_split,
            shard_tokens=shard_tokens,
            progress=progress,
        )
        index = writer.run()
        (folder / TOKENIZER_FILE).write_text(encoder.to_json(), encoding="utf-8")
        finish(folder, index, out, overwrite)
    return _summarize(out, index, validation_split)


def _survey(
    documents: Iterable[Document],
    validation_split: ValidationSplit,
    encoder: Tokenizer | None,
    train_tokenizer: int | None,
) -> Tokenizer:
    """The first pass: count the documents, find unreadable ones, train the tokenizer.

    Returns:
        `encoder`, or the one trained on the documents that are not held out as a whole.
    """
    texts = validation_split.survey(documents)
    if encoder is None:
        assert train_tokenizer is not None
        encoder = Tokenizer.train(texts, train_tokenizer)
    else:
        deque(texts, maxlen=0)  # reads all, keeps none
    if not validation_split.num_documents:
        raise DataError("no document has text: every one is empty, or there is none.")
    return encoder


def _digest(encoder: Tokenizer) -> str:
    """A short text that differs between tokenizers."""
    return hashlib.blake2b(encoder.to_json().encode(), digest_size=16).hexdigest()


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


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name}: {value} is not a positive number.")


def _load_encoder(path: Path) -> Tokenizer:
    """The tokenizer at `path`; DataError if it has no end-of-text token."""
    encoder = Tokenizer.load(path)
    try:
        _ = encoder.eos_id  # here, where it can be said which tokenizer has none
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return encoder


def _summarize(out: Path, index: CorpusIndex, validation_split: ValidationSplit) -> CorpusSummary:
    train, valid = index.splits["train"], index.splits["valid"]
    return CorpusSummary(
        path=out,
        vocab_size=index.vocab_size,
        num_train_documents=sum(shard.num_documents for shard in train),
        num_valid_documents=sum(shard.num_documents for shard in valid),
        num_train_tokens=sum(shard.num_tokens for shard in train),
        num_valid_tokens=sum(shard.num_tokens for shard in valid),
        num_shards=len(train) + len(valid),
        num_empty_documents=validation_split.num_empty,
    )
