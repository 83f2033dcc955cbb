"""Two tasks timed in turns: on a shared machine only ratios of alternating runs mean anything."""

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
        """The median of `ratios`."""
        return statistics.median(self.ratios)

    @property
    def ratios(self) -> tuple[float, ...]:
        """For each round, a's seconds over b's."""
        return tuple(x / y for x, y in zip(self.a, self.b, strict=True))

    def as_dict(self) -> dict[str, object]:
        """A JSON object: median and range of the ratios, and the median seconds of each task."""
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
    """Time two tasks in turns, after `warmup` rounds that are left out.

    The order alternates between rounds (A B, B A, A B, ..), so that neither always runs second.
    """
    a_seconds: list[float] = []
    b_seconds: list[float] = []
    for round_ in range(warmup + rounds):
        order = ((a, a_seconds), (b, b_seconds))
        for task, seconds in order if round_ % 2 == 0 else reversed(order):
            seconds.append(timed(task))
    return PairedTimes(a=tuple(a_seconds[warmup:]), b=tuple(b_seconds[warmup:]))


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
