"""What the engine has done so far."""

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, runtime_checkable


@runtime_checkable
class HasComputeTime(Protocol):
    """Counts the time that it spends computing."""

    compute_seconds: float


class EngineStats:
    """Counters since the start, or since `reset`."""

    def __init__(self, num_recursions: int) -> None:
        self._num_recursions = num_recursions
        self.reset()

    def reset(self) -> None:
        """Start to count anew."""
        self.steps = 0
        self.block_tokens = 0
        """Tokens times passes of the block."""
        self.seconds = 0.0
        """Spent in `step`."""
        self.compute_seconds = 0.0
        """Of these, in layers, head, routers and sampler; the rest is bookkeeping."""
        self.depth_histogram = [0] * (self._num_recursions + 1)
        """Generated tokens by the recursions of the position that produced them, from 0 on."""

    @property
    def tokens(self) -> int:
        """Generated tokens."""
        return sum(self.depth_histogram)

    def count_token(self, recursions: int) -> None:
        """One more generated token."""
        self.depth_histogram[recursions] += 1

    @contextmanager
    def time_step(self, runner: HasComputeTime) -> Generator[None]:
        """Time one tick."""
        began, before = time.perf_counter(), runner.compute_seconds
        yield
        self.steps += 1
        self.seconds += time.perf_counter() - began
        self.compute_seconds += runner.compute_seconds - before


class ProgressBar:
    """Requests done so far, on stderr, where it is a terminal."""

    def __init__(self, total: int, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            *Progress.get_default_columns()[:2],
            MofNCompleteColumn(),
            TextColumn("requests"),
            TimeElapsedColumn(),
            console=Console(file=sys.stderr),
            disable=not shown,
        )
        self._task = self._bar.add_task("generating", total=total)

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """One more request is done."""
        self._bar.advance(self._task)
