"""The progress of a training run on a terminal, or as plain lines in a pipe."""

import os
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.live import Live

from mor.train.config import TrainConfig
from mor.train.trainer import StepMetrics

_STOPPING = b"\nstopping after this step; saving ...\n"
_LINE_EVERY_S = 5.0  # seconds between lines when the output is not a terminal


@contextmanager
def watched(screen: Console, config: TrainConfig) -> Generator[tuple[Any, Any], None, None]:
    """Show a run's progress; gives what the trainer calls after each step, and whether to stop.

    The first is a function of the step's `StepMetrics`, which shows them. The second is a function
    that says whether a signal has asked to stop: SIGTERM and the first Ctrl-C finish the step, save
    and end; a second Ctrl-C ends at once.
    """
    is_stopping = [False]  # a list, because the handler below changes it

    def stop(number: int, frame: FrameType | None) -> None:
        if is_stopping[0] and number == signal.SIGINT:
            raise KeyboardInterrupt
        is_stopping[0] = True
        # A signal may come in the middle of a print or of an import, where rich cannot print.
        if not screen.quiet:
            os.write(2, _STOPPING if screen.is_terminal else _STOPPING.lstrip())

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        if sys.stdout.isatty() and not screen.quiet:
            with Live(console=screen, refresh_per_second=4, transient=False) as live:

                def show(row: StepMetrics) -> None:
                    live.update(_line(row, config, live.console))

                yield show, lambda: is_stopping[0]
        else:
            yield _Printer(screen, config), lambda: is_stopping[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _line(row: StepMetrics, config: TrainConfig, screen: Console) -> str:
    """The line of a step; prints the line of its evaluation, if there was one, above it."""
    if "nll_threshold" in row:
        screen.print(evaluation_line(row))
    left = max(0, row["total_steps"] - row["step"]) * config.tokens_per_step / row["tokens_per_s"]
    return (
        f"step {row['step']}/{row['total_steps']}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
        f"{row['tokens_per_s']:,.0f} tokens/s  MFU {row['mfu']:.0%}  ETA {_clock(left)}"
    )


def evaluation_line(row: StepMetrics) -> str:
    """The line of an evaluation: both losses and the depth histogram."""
    shares = " ".join(f"{share:.2f}" for share in row["depth_histogram"])
    return (
        f"step {row['step']}  NLL topk {row['nll_topk']:.4f}  threshold "
        f"{row['nll_threshold']:.4f}  depths {shares}"
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Printer:
    """Prints a plain line at most every five seconds, and every evaluation: for pipes and logs."""

    def __init__(self, screen: Console, config: TrainConfig) -> None:
        self._screen, self._config, self._last = screen, config, 0.0

    def __call__(self, row: StepMetrics) -> None:
        now = time.monotonic()
        if "nll_threshold" in row:
            self._screen.print(evaluation_line(row))
        elif now - self._last >= _LINE_EVERY_S:
            self._last = now
            self._screen.print(_line(row, self._config, self._screen))
