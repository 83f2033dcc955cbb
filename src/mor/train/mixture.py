"""What a run reads: one corpus, or several mixed by weight. Shape letters: B batch, T time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mor.errors import ConfigError, DataError
from mor.io.tokenizer import Tokenizer
from mor.train.config import TrainConfig
from mor.train.data import Batches, TokenShards, spread_windows, stack_rows

BLOCK = 1000
"""Sequences of a mixture in which every corpus has exactly its share, rounded to a thousandth."""


def quotas(weights: Sequence[float], total: int = BLOCK) -> list[int]:
    """`total` dealt out by weight, to the nearest whole numbers, at least 1 to each.

    Raises:
        ConfigError: there is not enough for all.
    """
    if len(weights) > total:
        raise ConfigError(f"{len(weights)} corpora cannot share {total} sequences: mix fewer.")
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    while (missing := total - sum(counts)) != 0:
        sign = 1 if missing > 0 else -1
        able = [i for i, count in enumerate(counts) if count + sign > 0]
        counts[max(able, key=lambda i: sign * (exact[i] - counts[i]))] += sign
    return counts


class MixedBatches:
    """Batches of several corpora, in an order that only the seed and the batch number decide.

    The order is made of blocks of 1,000 sequences. In each a corpus has its share, in a place of
    its own in every block; the k-th sequence that it gives is the k-th of its own endless order
    (see `Batches`), so a small corpus comes round more often than a large one.
    """

    def __init__(
        self, parts: Sequence[Batches], weights: Sequence[float], *, batch_size: int, seed: int
    ) -> None:
        """Args:
        parts: each corpus alone, whatever its batch size.
        weights: of the corpora, above 0.
        batch_size: B, sequences in a batch.
        seed: of the order of corpora.

        Raises:
            ConfigError: more than 1,000 corpora.
        """
        self.counts = quotas(weights)
        self._parts = parts
        self._batch_size = batch_size
        self._seed = seed
        self._block: tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    @property
    def num_windows(self) -> int:
        """Windows of all corpora."""
        return sum(part.num_windows for part in self._parts)

    def at(self, index: int) -> Tensor:
        """Batch number `index` (from 0, without end): int64 (B, T + 1).

        Raises:
            DataError: `index` is negative.
        """
        return stack_rows(self.row, index, self._batch_size)

    def row(self, position: int) -> npt.NDArray[np.int64]:
        """The sequence at `position` of the endless order: int64 (T + 1,)."""
        source, place = self.source_of(position)
        return self._parts[source].row(place)

    def source_of(self, position: int) -> tuple[int, int]:
        """Which corpus the sequence at `position` is from, and its position in that one's order."""
        block, offset = divmod(position, BLOCK)
        if self._block is None or self._block[0] != block:
            dealt = np.repeat(np.arange(len(self.counts)), self.counts)
            order = np.random.default_rng((self._seed, block, 0, 1)).permutation(dealt)
            ranks = np.empty(BLOCK, np.int64)
            for source, count in enumerate(self.counts):
                ranks[order == source] = np.arange(count)
            self._block = (block, order, ranks)
        source = int(self._block[1][offset])
        return source, block * self.counts[source] + int(self._block[2][offset])


@dataclass(frozen=True)
class TrainingData:
    """All that a run reads."""

    batches: Batches | MixedBatches
    valid: Tensor
    """(windows, T + 1) to evaluate on: each corpus's held-out text by its weight."""
    calibration: Tensor | None
    """(windows, T + 1) of training text; None if the config wants none."""
    tokenizer: Tokenizer
    eos_id: int
    vocab_size: int

    @classmethod
    def open(
        cls, config: TrainConfig, corpora: Sequence[tuple[Path, float]], batch_size: int
    ) -> "TrainingData":
        """Open corpora, each with its weight.

        Raises:
            DataError: one cannot be read, is too small, or has another tokenizer than the first.
        """
        paths, weights = [path for path, _ in corpora], [weight for _, weight in corpora]
        length = config.sequence_length
        train = [TokenShards.open(path, "train", verify=config.verify_data) for path in paths]
        valid = [TokenShards.open(path, "valid", verify=config.verify_data) for path in paths]
        tokenizer = Tokenizer.load(paths[0])
        for path in paths[1:]:
            if Tokenizer.load(path).to_json() != tokenizer.to_json():
                raise DataError(
                    f"{path}: made with another tokenizer than {paths[0]}: build it again with "
                    f"`mor data build --tokenizer {paths[0]}`."
                )
        parts = [
            Batches(
                shards,
                sequence_length=length,
                batch_size=batch_size,
                seed=config.seed,
                stream=stream,
            )
            for stream, shards in enumerate(train)
        ]
        mixed = MixedBatches(parts, weights, batch_size=batch_size, seed=config.seed)
        num = config.calibration_windows
        return cls(
            batches=mixed if len(parts) > 1 else parts[0],
            valid=spread_mixture(valid, weights, length, config.eval_windows),
            calibration=spread_mixture(train, weights, length, num) if num else None,
            tokenizer=tokenizer,
            eos_id=train[0].eos_id,
            vocab_size=max(shards.vocab_size for shards in train),
        )


def spread_mixture(
    shards: Sequence[TokenShards], weights: Sequence[float], length: int, num_windows: int
) -> Tensor:
    """At most `num_windows` windows of all corpora by weight, at least one of each: (B, T + 1).

    Each corpus's are evenly spread over it.

    Raises:
        DataError: a split is too short for one window.
    """
    counts = quotas(weights, max(num_windows, len(weights)))
    spread = [spread_windows(s, length, c) for s, c in zip(shards, counts, strict=True)]
    return torch.cat(spread)
