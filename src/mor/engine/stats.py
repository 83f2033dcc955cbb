"""Counters of an engine's work, and the progress bar of `LLM.generate`."""

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, runtime_checkable


@runtime_checkable
class HasComputeTime(Protocol):
    """A model runner, as the statistics see it."""

    compute_seconds: float
    """Seconds spent in layers, head, routers and sampler so far."""


class EngineStats:
    """Counters since the engine was made, or since `reset`."""

    def __init__(self, num_recursions: int) -> None:
        self._num_recursions = num_recursions
        self.reset()

    def reset(self) -> None:
        """Set all counters to zero."""
        self.steps = 0
        """Engine steps; each of several in a row counts."""
        self.block_tokens = 0
        """Tokens that took a pass of the block, summed over passes."""
        self.seconds = 0.0
        """Seconds spent in `LLM.step`."""
        self.compute_seconds = 0.0
        """Seconds of these in layers, head, routers and sampler; the rest is bookkeeping."""
        self.depth_histogram = [0] * (self._num_recursions + 1)
        """[r]: generated tokens whose position, the one that produced them, took r recursions."""

    @property
    def tokens(self) -> int:
        """Generated tokens."""
        return sum(self.depth_histogram)

    def count_token(self, recursions: int) -> None:
        """Count a generated token whose position took so many recursions."""
        self.depth_histogram[recursions] += 1

    @contextmanager
    def time_step(self, runner: HasComputeTime) -> Generator[None]:
        """Count the step that runs inside, its time, and its share of `runner`'s."""
        began, before = time.perf_counter(), runner.compute_seconds
        yield
        self.steps += 1
        self.seconds += time.perf_counter() - began
        self.compute_seconds += runner.compute_seconds - before


class ProgressBar:
    """A bar on stderr that shows how many of `total` requests are done.

    Args:
        shown: False draws nothing.
    """

    def __init__(self, total: int, shown: bool) -> None:
        # Imported here: it takes a while to load, and only `generate` draws a bar.
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
        """Count one more request as done."""
        self._bar.advance(self._task)
