"""What a run reads: one corpus, or several mixed by weight. Shape letters: B batch, T time."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mor.data.batches import Batches, TokenShards, spread_windows, stack_rows
from mor.errors import ConfigError

SEQUENCES_PER_CYCLE = 1000
"""Sequences of a mixture in which every corpus has exactly its share, rounded to a thousandth."""


def sequence_quotas(weights: Sequence[float], total: int = SEQUENCES_PER_CYCLE) -> list[int]:
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
        self.counts = sequence_quotas(weights)
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
        block, offset = divmod(position, SEQUENCES_PER_CYCLE)
        if self._block is None or self._block[0] != block:
            dealt = np.repeat(np.arange(len(self.counts)), self.counts)
            order = np.random.default_rng((self._seed, block, 0, 1)).permutation(dealt)
            ranks = np.empty(SEQUENCES_PER_CYCLE, np.int64)
            for source, count in enumerate(self.counts):
                ranks[order == source] = np.arange(count)
            self._block = (block, order, ranks)
        source = int(self._block[1][offset])
        return source, block * self.counts[source] + int(self._block[2][offset])


def spread_mixture(
    shards: Sequence[TokenShards], weights: Sequence[float], length: int, num_windows: int
) -> Tensor:
    """At most `num_windows` windows of all corpora by weight, at least one of each: (B, T + 1).

    Each corpus's are evenly spread over it.

    Raises:
        DataError: a split is too short for one window.
    """
    counts = sequence_quotas(weights, max(num_windows, len(weights)))
    spread = [spread_windows(s, length, c) for s, c in zip(shards, counts, strict=True)]
    return torch.cat(spread)
