"""`TokenShards` and `Batches`: a corpus as one long array, as windows, and as training batches.

`mor.data.shards` describes the files. Shape letters: B batch, T time.
"""

import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mor.data.shards import REBUILD, CorpusIndex, Shard
from mor.errors import ConfigError, DataError

_CRC_TOKENS = 2**22  # read at a time to check a shard


class TokenShards:
    """The tokens of one split as if they were one long array, read from disk when asked for."""

    def __init__(
        self, path: Path, split: str, index: CorpusIndex, arrays: Sequence[npt.NDArray[Any]]
    ) -> None:
        """For `open`; `arrays` are the tokens of the split's shards in order."""
        self.path = path
        self.split = split
        self._index = index
        self._arrays = arrays
        self._starts = [0, *accumulate(len(array) for array in arrays)]

    @classmethod
    def open(cls, path: Path | str, split: str = "train", verify: bool = True) -> "TokenShards":
        """Memory-map the shards of one split.

        Args:
            path: folder of the corpus.
            split: `train` or `valid`.
            verify: also read every shard once and compare its CRC-32 with the index.

        Raises:
            DataError: no corpus, no such split, or a shard that is missing or damaged, named.
        """
        folder = Path(path)
        index = CorpusIndex.read(folder)
        if not index.splits.get(split):
            held = ", ".join(name for name, shards in index.splits.items() if shards)
            raise DataError(
                f"{folder}: the corpus has no documents in the split {split!r}, only in {held}: "
                "build it with more documents and valid_fraction above 0."
            )
        arrays = [
            _map_shard(folder / shard.file, shard, index.storage_dtype, verify)
            for shard in index.splits[split]
        ]
        return cls(folder, split, index, arrays)

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, end-of-text ids included."""
        return self._starts[-1]

    @property
    def num_documents(self) -> int:
        """Documents of the split."""
        return sum(shard.num_documents for shard in self._index.splits[self.split])

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that the tokenizer has."""
        return self._index.vocab_size

    @property
    def eos_id(self) -> int:
        """The end-of-text id, which follows each document."""
        return self._index.eos_id

    def window(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """The `length` tokens from token `start` of the split on, across shards: int64 (length,).

        Raises:
            DataError: the window does not lie inside the split.
        """
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise DataError(
                f"{self.path}: tokens {start} to {start + length} do not lie in the split "
                f"{self.split!r}, which holds {self.num_tokens}."
            )
        tokens = np.empty(length, np.int64)
        filled = 0  # a turn copies what lies in one shard
        while filled < length:
            shard = bisect_right(self._starts, start + filled) - 1
            offset = start + filled - self._starts[shard]
            part = self._arrays[shard][offset : offset + length - filled]
            tokens[filled : filled + len(part)] = part
            filled += len(part)
        return tokens


def _map_shard(
    file: Path, shard: Shard, dtype: np.dtype[Any], verify: bool
) -> npt.NDArray[np.unsignedinteger]:
    """The tokens of a shard, memory-mapped; DataError if they are not what the index says."""
    expected_bytes = shard.num_tokens * dtype.itemsize
    try:
        num_bytes = file.stat().st_size
        if num_bytes != expected_bytes:
            raise DataError(
                f"{file}: holds {num_bytes:,} bytes, the index says {expected_bytes:,}: {REBUILD}"
            )
        tokens = np.memmap(file, dtype, mode="r")
    except FileNotFoundError as error:
        raise DataError(f"{file}: the shard is missing: {REBUILD}") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}).") from error
    if verify:
        crc32 = 0
        for start in range(0, len(tokens), _CRC_TOKENS):
            crc32 = zlib.crc32(tokens[start : start + _CRC_TOKENS].tobytes(), crc32)
        if crc32 != shard.crc32:
            raise DataError(
                f"{file}: its content has changed (CRC-32 {crc32:08x}, the index says "
                f"{shard.crc32:08x}): {REBUILD}"
            )
    return tokens


def _count_windows(shards: TokenShards, sequence_length: int) -> int:
    """Number of windows of T + 1 tokens that start at 0, T, 2 T, ...

    Neighbors share a token: the last target of one is the first input of the next.
    """
    if sequence_length < 1:
        raise ConfigError(f"sequence_length: {sequence_length} is not a positive number.")
    num_windows = (shards.num_tokens - 1) // sequence_length
    if num_windows < 1:
        raise DataError(
            f"{shards.path}: the split {shards.split!r} holds {shards.num_tokens} tokens, one "
            f"window of sequence_length {sequence_length} needs {sequence_length + 1}: build a "
            "larger corpus or choose a shorter sequence_length."
        )
    return num_windows


def sequential_windows(
    shards: TokenShards, sequence_length: int, max_windows: int | None = None
) -> Iterator[npt.NDArray[np.int64]]:
    """The windows of a split in the order of the text, for evaluation.

    Each is int64 (T + 1,) with inputs `window[:-1]` and targets `window[1:]`, so no target comes
    twice. What is left after the last whole window is dropped.

    Args:
        sequence_length: T.
        max_windows: stop after so many; None reads all.

    Raises:
        ConfigError: a number is not positive.
        DataError: the split is too short for one window.
    """
    num_windows = _count_windows(shards, sequence_length)
    if max_windows is not None:
        if max_windows < 1:
            raise ConfigError(f"max_windows: {max_windows} is not a positive number.")
        num_windows = min(num_windows, max_windows)
    return (
        shards.window(window * sequence_length, sequence_length + 1)
        for window in range(num_windows)
    )


def spread_windows(shards: TokenShards, sequence_length: int, num_windows: int) -> torch.Tensor:
    """At most `num_windows` windows, evenly spread over the split: int64 (B, T + 1).

    Raises:
        ConfigError: a number is not positive.
        DataError: the split is too short for one window.
    """
    available = _count_windows(shards, sequence_length)
    if num_windows < 1:
        raise ConfigError(f"num_windows: {num_windows} is not a positive number.")
    count = min(num_windows, available)
    starts = [i * available // count * sequence_length for i in range(count)]
    rows = [shards.window(start, sequence_length + 1) for start in starts]
    return torch.from_numpy(np.stack(rows))


def stack_rows(
    row: Callable[[int], npt.NDArray[np.int64]], index: int, batch_size: int
) -> torch.Tensor:
    """Batch number `index` of an endless order of sequences: int64 (B, T + 1).

    Raises:
        DataError: `index` is negative.
    """
    if index < 0:
        raise DataError(f"batch {index}: batches are numbered from 0.")
    rows = [row(index * batch_size + i) for i in range(batch_size)]
    return torch.from_numpy(np.stack(rows))


class Batches:
    """Batches in an endless order that the seed and the batch number alone decide.

    So a run resumes from one number and needs no other state. Every window comes once per epoch,
    in an order that differs from epoch to epoch; a batch may span the end of an epoch.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        stream: int = 0,
    ) -> None:
        """Cut `shards` into windows of T + 1 tokens.

        Args:
            sequence_length: T, the tokens that a sequence predicts.
            batch_size: B, sequences in a batch.
            seed: of the order, not negative.
            shuffle: False reads the windows in the order of the text in every epoch.
            stream: another number gives another order from the same seed.

        Raises:
            ConfigError: a number is out of its range.
            DataError: the split is too short for one window.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size} is not a positive number.")
        if seed < 0:
            raise ConfigError(f"seed: {seed} is negative: choose 0 or more.")
        self.num_windows = _count_windows(shards, sequence_length)
        self._shards = shards
        self._sequence_length = sequence_length
        self._batch_size = batch_size
        self._seed, self._stream = seed, stream
        self._shuffle = shuffle
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None  # epoch, its permutation

    def at(self, index: int) -> torch.Tensor:
        """Batch number `index` (from 0, without end): int64 (B, T + 1).

        Inputs are `batch[:, :-1]`, targets `batch[:, 1:]`.

        Raises:
            DataError: `index` is negative.
        """
        return stack_rows(self.row, index, self._batch_size)

    def row(self, position: int) -> npt.NDArray[np.int64]:
        """The sequence at `position` of the endless order: int64 (T + 1,)."""
        window = self._window_at(position)
        return self._shards.window(window * self._sequence_length, self._sequence_length + 1)

    def _window_at(self, position: int) -> int:
        """Number of the window at `position` of the endless order."""
        epoch, offset = divmod(position, self.num_windows)
        if not self._shuffle:
            return offset
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng((self._seed, epoch, self._stream))
            self._order = (epoch, generator.permutation(self.num_windows))
        return int(self._order[1][offset])
