"""`SpikeDetector`: stops a run whose loss breaks, before its weights change."""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mor.errors import ConfigError
from mor.io.checkpoint import newest_step
from mor.train.config import TrainConfig

_WINDOW = 100  # latest losses that a new one is compared with
_MIN_LOSSES = 20  # fewer say too little about the spread: nothing is a spike yet
_MIN_SPREAD = 0.05  # nats: large batches spread less, and their small jumps harm nobody


class SpikeDetector:
    """Compares each step's loss with the latest ones.

    A loss spikes when it lies more than `spike_threshold` robust standard deviations (1.4826 times
    the median distance from the median, at least 0.05 nats) above the median of the latest 100.
    1.4826 makes that distance the standard deviation of normally distributed losses.
    """

    def __init__(self, config: TrainConfig, run: Path, rows: Iterable[dict[str, Any]] = ()) -> None:
        """Start with the losses of a resumed run's `metrics.jsonl`.

        Args:
            run: the run's folder, whose newest checkpoint a message names.
            rows: lines of `metrics.jsonl` so far.
        """
        self._config, self._run = config, run
        self._losses = deque[float]((row["loss"] for row in rows), maxlen=_WINDOW)

    def check(self, step: int, loss: float, grad_norm: float) -> None:
        """Refuse or accept an optimizer step before it changes the weights.

        Args:
            step: number of the step, from 1.
            loss: in nats; an accepted one joins those that later ones are compared with.
            grad_norm: before clipping.

        Raises:
            ConfigError: the loss or the gradient norm is no number, or the loss spikes; the message
                names the newest checkpoint.
        """
        # The norm as well: an auxiliary loss may break while the language-model loss is fine.
        for what, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                raise ConfigError(f"the {what} became {value} at step {step}: {self._advice()}")
        limit = self.limit()
        if loss > limit:
            raise ConfigError(
                f"the loss spiked to {loss:.4f} at step {step} (the latest steps allow "
                f"{limit:.4f}): {self._advice()}; or raise spike_threshold (now "
                f"{self._config.spike_threshold:g}; 0 never stops) and resume."
            )
        self._losses.append(loss)

    def limit(self) -> float:
        """The highest loss that is no spike; infinite with `spike_threshold=0` and at the start."""
        if not self._config.spike_threshold or len(self._losses) < _MIN_LOSSES:
            return math.inf
        median = statistics.median(self._losses)
        spread = 1.4826 * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self._config.spike_threshold * max(spread, _MIN_SPREAD)

    def _advice(self) -> str:
        newest = newest_step(self._run)
        saved = f"the last good checkpoint is {newest}" if newest else "no checkpoint was saved yet"
        config = self._config
        return f"{saved}; try a lower lr (now {config.lr:g}) or clip (now {config.clip:g})"
