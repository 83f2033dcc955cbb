"""Paired timing: on a shared machine only ratios of alternating runs mean anything."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class PairedTimes:
    """Seconds of two tasks that ran in turns: A B A B .."""

    a: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median over rounds of a's seconds divided by b's."""
        return statistics.median(self.ratios)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of each round."""
        return tuple(x / y for x, y in zip(self.a, self.b, strict=True))

    def as_dict(self) -> dict[str, object]:
        """For JSON: the median, its spread, and the medians of both sides."""
        return {
            "ratio": self.ratio,
            "ratio_min": min(self.ratios),
            "ratio_max": max(self.ratios),
            "a_s": statistics.median(self.a),
            "b_s": statistics.median(self.b),
            "rounds": len(self.a),
        }


def paired(
    a: Callable[[], object], b: Callable[[], object], *, rounds: int, warmup: int = 1
) -> PairedTimes:
    """Time two tasks in turns, after `warmup` rounds that do not count.

    The order alternates between rounds, so that neither side always runs second.
    """
    seconds: dict[int, list[float]] = {0: [], 1: []}
    tasks = (a, b)
    for round_ in range(warmup + rounds):
        for side in (0, 1) if round_ % 2 == 0 else (1, 0):
            taken = timed(tasks[side])
            if round_ >= warmup:
                seconds[side].append(taken)
    return PairedTimes(a=tuple(seconds[0]), b=tuple(seconds[1]))


def timed(task: Callable[[], object]) -> float:
    """Seconds of one call; on a GPU until the device has finished."""
    _synchronize()
    started = time.perf_counter()
    task()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gemm_gflops(size: int = 1536, rounds: int = 5) -> float:
    """The machine's best rate for a large square fp32 matrix product, in GFLOP/s."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = min(timed(lambda: a @ b) for _ in range(rounds))
    return 2 * size**3 / best / 1e9
