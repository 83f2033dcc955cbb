"""The files of a tokenized corpus: their index, `CorpusIndex`, and `ShardWriter`.

A corpus is a folder that `mor.data.corpus` writes and `mor.data.batches` reads:

    index.json            what the shards hold, so that a damaged one is noticed
    tokenizer.json        what their tokens mean
    train-00000.bin       token ids, little-endian uint16 or uint32, documents one after another,
    train-00001.bin ...   each followed by the end-of-text id
    train-00000.docs.npy  int64 (documents of the shard,): where in the shard each one starts
    valid-00000.bin ...   the held-out documents, likewise
"""

import io
import json
import os
import zlib
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mor.errors import DataError

INDEX_FILE = "index.json"
INDEX_VERSION = 1
REBUILD = "rebuild with `mor data build`."
_DTYPES = MappingProxyType({"uint16": "<u2", "uint32": "<u4"})


@dataclass(frozen=True)
class Shard:
    """The index's entry of one `.bin` file; the fields' names are its keys."""

    __no_type_check__ = True  # values come from a file: CorpusIndex.read checks them

    file: str
    num_tokens: int
    num_documents: int
    crc32: int


@dataclass(frozen=True)
class CorpusIndex:
    """`index.json`: the vocabulary of a corpus and its shards by split."""

    vocab_size: int
    eos_id: int
    splits: dict[str, tuple[Shard, ...]]
    """The shards of `train` and `valid`, in order; a split may have none."""

    @property
    def dtype(self) -> str:
        """The narrowest type that holds every token id: `uint16` or `uint32`."""
        return "uint16" if self.vocab_size <= 2**16 else "uint32"

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """numpy's type of the files: `dtype`, little-endian."""
        return np.dtype(_DTYPES[self.dtype])

    def to_json(self) -> str:
        """The text of `index.json`."""
        return json.dumps({"version": INDEX_VERSION, "dtype": self.dtype} | asdict(self), indent=1)

    @classmethod
    def read(cls, folder: Path) -> "CorpusIndex":
        """The index of the corpus in `folder`.

        Raises:
            DataError: there is none, it is damaged, or another version of mor wrote it.
        """
        file = folder / INDEX_FILE
        if not file.is_file():
            raise DataError(
                f"{folder}: there is no corpus here ({INDEX_FILE} is missing): "
                f"build one with `mor data build SOURCE --out {folder}`."
            )
        try:
            return _parse_index(json.loads(file.read_text(encoding="utf-8")))
        except KeyError as error:
            raise DataError(f"{file}: the field {error} is missing: {REBUILD}") from error
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{file}: not a readable index ({error}): {REBUILD}") from error


def _parse_index(fields: Any) -> CorpusIndex:
    """The index from parsed JSON; KeyError, TypeError or ValueError if it cannot be one."""
    if fields["version"] != INDEX_VERSION:
        raise ValueError(f"version {fields['version']}, this mor reads {INDEX_VERSION}")
    index = CorpusIndex(
        vocab_size=int(fields["vocab_size"]),
        eos_id=int(fields["eos_id"]),
        splits={
            split: tuple(Shard(**shard) for shard in shards)
            for split, shards in fields["splits"].items()
        },
    )
    if fields["dtype"] != index.dtype:
        raise ValueError(f"dtype {fields['dtype']} does not fit vocab_size {index.vocab_size}")
    for shard in (shard for shards in index.splits.values() for shard in shards):
        if Path(shard.file).name != shard.file:  # a foreign index must not name files elsewhere
            raise ValueError(f"shard {shard.file!r} does not lie in the folder of the index")
        numbers = (shard.num_tokens, shard.num_documents, shard.crc32)
        if not all(isinstance(number, int) for number in numbers) or min(numbers[:2]) < 1:
            raise ValueError(f"shard {shard.file!r} has impossible numbers {numbers}")
    return index


class ShardWriter:
    """Writes the shards of one split; leaving the `with` block completes the last one.

    A document is never split between shards: one ends with the document that brings it to
    `shard_tokens` tokens.
    """

    def __init__(self, folder: Path, split: str, index: CorpusIndex, shard_tokens: int) -> None:
        """Write to `folder` with the id type of `index`; no file before the first document."""
        self.shards: list[Shard] = []
        self._folder = folder
        self._split = split
        self._dtype: np.dtype[Any] = index.storage_dtype
        self._eos_id = index.eos_id
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        # Of the shard that is being written:
        self._starts = array("q")  # where each of its documents starts, int64
        self._num_tokens = 0
        self._crc32 = 0
        self._inside_document = False

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is None:
            return
        if kind is None:
            self._finish()
        else:
            with suppress(OSError):  # what is still buffered may not fit either
                self._file.close()

    @property
    def num_written(self) -> int:
        """Tokens of the split so far, those of the open shard included."""
        return sum(shard.num_tokens for shard in self.shards) + self._num_tokens

    def state(self) -> dict[str, Any] | None:
        """How far the shards are, for `restore`; on disk when this returns. None in a document."""
        if self._inside_document:
            return None
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"shards": [asdict(shard) for shard in self.shards], "tokens": self._num_tokens}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after a state; what was written later is cut off.

        Raises:
            OSError: the shard cannot be read.
            DataError: it has fewer tokens than the state says.
        """
        self.shards = [Shard(**shard) for shard in state["shards"]]
        if not state["tokens"]:  # it ended with a complete shard
            return
        path = self._folder / f"{self._name}.bin"
        tokens = np.fromfile(path, self._dtype, state["tokens"])
        if len(tokens) < state["tokens"] or tokens[-1] != self._eos_id:
            raise DataError(
                f"{path}: not what the journal beside it says: remove {self._folder.parent} and "
                "build again."
            )
        self._file = path.open("r+b")
        self._file.truncate(tokens.nbytes)
        self._file.seek(0, io.SEEK_END)
        ends = np.flatnonzero(tokens[:-1] == self._eos_id)  # an end of text is nowhere else
        self._starts = array("q", [0, *(ends + 1).tolist()])
        self._num_tokens, self._crc32 = len(tokens), zlib.crc32(tokens.tobytes())

    def write(self, ids: Sequence[int] | npt.NDArray[Any], ends_document: bool) -> None:
        """Append a document or a part of one; the end-of-text id is added after its end.

        Raises:
            OSError: the disk is full, or the like.
        """
        if self._file is None:
            self._file = (self._folder / f"{self._name}.bin").open("wb")
        if not self._inside_document:
            self._starts.append(self._num_tokens)
        tokens = np.asarray(ids, self._dtype)
        if ends_document:
            tokens = np.append(tokens, self._dtype.type(self._eos_id))
        data = tokens.tobytes()
        self._file.write(data)
        self._crc32 = zlib.crc32(data, self._crc32)
        self._num_tokens += len(tokens)
        self._inside_document = not ends_document
        if ends_document and self._num_tokens >= self._shard_tokens:
            self._finish()

    @property
    def _name(self) -> str:
        return f"{self._split}-{len(self.shards):05d}"

    def _finish(self) -> None:
        assert self._file is not None
        assert not self._inside_document
        self._file.close()
        starts = io.BytesIO()  # numpy's own file writing would hide that the disk is full
        np.save(starts, np.asarray(self._starts, np.int64))
        (self._folder / f"{self._name}.docs.npy").write_bytes(starts.getvalue())
        self.shards.append(
            Shard(f"{self._name}.bin", self._num_tokens, len(self._starts), self._crc32)
        )
        self._file, self._starts, self._num_tokens, self._crc32 = None, array("q"), 0, 0
