"""Corpora mixed by weight: batches of them, and windows to evaluate on.

Shape letters: B batch, T time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mor.data.batches import Batches, TokenShards, spread_windows, stack_rows
from mor.errors import ConfigError

SEQUENCES_PER_CYCLE = 1000
"""Sequences after which every corpus has had exactly its share, rounded to a thousandth."""


class _Cycle(NamedTuple):
    """The order of corpora in one cycle of `SEQUENCES_PER_CYCLE` sequences."""

    number: int
    sources: npt.NDArray[np.int64]
    """(cycle,) the corpus of each sequence."""
    ranks: npt.NDArray[np.int64]
    """(cycle,) how many sequences of the same corpus come before it in the cycle."""


def sequence_quotas(weights: Sequence[float], total: int = SEQUENCES_PER_CYCLE) -> list[int]:
    """Whole numbers near weight / sum(weights) * total that add up to `total`, each at least 1.

    Raises:
        ConfigError: there are more weights than `total`.
    """
    if len(weights) > total:
        raise ConfigError(f"{len(weights)} corpora cannot share {total} sequences: mix fewer.")
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    # Rounding down leaves some over; the minimum of 1 may have given out too many. Each step
    # changes the count that is furthest from its exact share.
    while (missing := total - sum(counts)) != 0:
        sign = 1 if missing > 0 else -1
        able = [i for i, count in enumerate(counts) if count + sign > 0]
        counts[max(able, key=lambda i: sign * (exact[i] - counts[i]))] += sign
    return counts


class MixedBatches:
    """Batches of several corpora, in an order that only the seed and the batch number decide.

    The order is made of cycles of 1,000 sequences. Each cycle holds every corpus's share, shuffled
    anew; the k-th sequence of a corpus in the whole order is the k-th of its own endless order
    (`Batches.row`), so a small corpus is repeated more often than a large one.
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
        self._cycle: _Cycle | None = None  # the latest one; runs read forward

    @property
    def num_windows(self) -> int:
        """Windows of all corpora together."""
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
        number, offset = divmod(position, SEQUENCES_PER_CYCLE)
        if self._cycle is None or self._cycle.number != number:
            self._cycle = self._shuffle(number)
        source = int(self._cycle.sources[offset])
        # Every earlier cycle has taken `counts` sequences of it.
        return source, number * self.counts[source] + int(self._cycle.ranks[offset])

    def _shuffle(self, number: int) -> _Cycle:
        unshuffled = np.repeat(np.arange(len(self.counts)), self.counts)
        # `Batches` seeds with three numbers; a fourth that is not 0 draws something else.
        sources = np.random.default_rng((self._seed, number, 0, 1)).permutation(unshuffled)
        ranks = np.empty(SEQUENCES_PER_CYCLE, np.int64)
        for source, count in enumerate(self.counts):
            ranks[sources == source] = np.arange(count)
        return _Cycle(number=number, sources=sources, ranks=ranks)


def spread_mixture(
    shards: Sequence[TokenShards], weights: Sequence[float], length: int, num_windows: int
) -> Tensor:
    """(B, T + 1): at most `num_windows` windows, shared out over the corpora by weight.

    Each corpus gives at least one; its windows are evenly spread over it.

    Args:
        length: T.

    Raises:
        DataError: a split is too short for one window.
    """
    counts = sequence_quotas(weights, max(num_windows, len(weights)))
    spread = [spread_windows(s, length, c) for s, c in zip(shards, counts, strict=True)]
    return torch.cat(spread)
