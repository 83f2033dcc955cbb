"""`CorpusWriter`: the second pass of a build, documents into shards; moving them to their place."""

import re
import secrets
import shutil
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mor.data.build_journal import Journal
from mor.data.encoding import batched_segments, encode_in_order
from mor.data.shards import INDEX_FILE, CorpusIndex, ShardWriter
from mor.data.sources import Document
from mor.data.validation_split import ValidationSplit
from mor.errors import DataError
from mor.io.atomic_files import storage_error
from mor.io.tokenizer import Tokenizer

_STATE_TOKENS = 2**23  # written between two states of the journal
_CORPUS_FILE = re.compile(r"tokenizer\.json|index\.json|(train|valid)-\d{5,}\.(bin|docs\.npy)")


def check_out(out: Path, overwrite: bool) -> None:
    """Raise DataError if a corpus cannot be written to `out` without a loss."""
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


def finish(folder: Path, index: CorpusIndex, out: Path, overwrite: bool) -> None:
    """Write the index of the corpus in `folder`, and move the folder to `out`.

    A corpus in `out` is moved aside first and deleted last; if the move fails it is put back.

    Raises:
        DataError: `out` has been taken in the meantime.
    """
    (folder / INDEX_FILE).write_text(index.to_json(), encoding="utf-8")
    check_out(out, overwrite)  # again: another build may have ended first
    replaced = out.with_name(f"{out.name}.old-{secrets.token_hex(4)}")
    try:
        if out.exists():
            out.replace(replaced)
        folder.replace(out)
    except BaseException:
        if replaced.exists() and not out.exists():
            replaced.replace(out)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def staged(out: Path) -> Generator[Path, None, None]:
    """Context with a new folder beside `out`, which is deleted at the end unless it was moved."""
    staging = out.with_name(f"{out.name}.tmp-{secrets.token_hex(4)}")
    try:
        staging.mkdir(parents=True)
        yield staging
    except OSError as error:
        raise storage_error(out, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class CorpusWriter:
    """Encodes the documents and writes the shards of both splits, or the rest of them."""

    folder: Path
    """Where the shards are written."""
    read: Callable[[int], Iterable[Document]]
    """Gives the documents without so many first ones."""
    encoder: Tokenizer
    validation_split: ValidationSplit
    shard_tokens: int
    workers: int = 1
    """Processes that encode."""
    progress: Callable[[int, int], None] | None = None
    """Called with the numbers of written and of all documents."""
    journal: Journal | None = None
    """Records now and then how far the shards are; None: the build cannot be taken up again."""

    def run(self) -> CorpusIndex:
        """Write what the journal does not say is written, and return the whole corpus's index.

        Raises:
            DataError: the sources hold other documents than in the first pass.
            OSError: the shards cannot be written.
        """
        index = CorpusIndex(self.encoder.vocab_size, self.encoder.eos_id, {})
        before = self.journal.entries.get("state") if self.journal else None
        # Documents with text so far, all documents so far, tokens in the journal's last state.
        number = read = saved = 0
        with (
            ShardWriter(self.folder, "train", index, self.shard_tokens) as train,
            ShardWriter(self.folder, "valid", index, self.shard_tokens) as valid,
        ):
            writers = {"train": train, "valid": valid}
            if before is not None:
                # Shards are cut back to the state: what a killed build wrote after it is redone.
                number, read = before["documents"], before["read"]
                for split, writer in writers.items():
                    writer.restore(before[split])
                saved = train.num_written + valid.num_written
            total = self.validation_split.num_documents
            batches = batched_segments(self.read(read), read)
            for segment, ids in encode_in_order(batches, self.encoder, self.workers):
                split = self.validation_split.split_of(number, segment.document)
                writers[split].write(ids, ends_document=segment.is_last)
                number += segment.is_last
                if self.progress and segment.is_last:
                    self.progress(number, total)
                # A state is one between two documents, of both splits at once.
                written = train.num_written + valid.num_written
                if segment.is_last and self.journal and written >= saved + _STATE_TOKENS:
                    saved = written
                    states = {split: writer.state() for split, writer in writers.items()}
                    place = {"documents": number, "read": segment.number + 1}
                    self.journal.record("state", place | states)
        if number != total:
            raise DataError(
                f"the sources held {total} documents and then {number}: "
                "build again when nothing changes them."
            )
        return replace(index, splits={"train": tuple(train.shards), "valid": tuple(valid.shards)})
