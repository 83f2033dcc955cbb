"""Watching a run: stop when it breaks, say how fast it is, show it in TensorBoard."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from mor.errors import ConfigError
from mor.io.checkpoint import newest_step
from mor.model.config import MoRConfig
from mor.model.cost import training_flops
from mor.train.config import TrainConfig
from mor.train.schedule import step_flops
from mor.train.throughput import gemm_peak, peak_memory

_WINDOW = 100  # latest losses that a new one is compared with
_MIN = 20  # losses before the rule may speak
_FLOOR = 0.05  # nats: a spread that large batches fall short of, and that harms nobody


class Watch:
    """Stops a run that breaks, before anything of it is kept, and counts its FLOPs and their rate.

    A loss spikes when it lies more than `spike_threshold` robust standard deviations (1.4826 times
    the median distance from the median, at least 0.05 nats) above the median of the latest 100.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: MoRConfig,
        out: Path,
        device: torch.device,
        rows: Iterable[dict[str, Any]] = (),
    ) -> None:
        """Watch a run from its start, or go on after the lines that it has written so far."""
        self.config, self.model, self.out, self.device = config, model, out, device
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._flops = self._step_flops = 0.0
        for row in rows:
            self._losses.append(row["loss"])
            self._flops = row.get("flops") or self._flops
        self._peak: float | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # of a run before in this process

    def check(self, step: int, loss: float, norm: float) -> None:
        """Look at a step before it changes the weights.

        Raises:
            ConfigError: the loss or the gradient norm is no number, or the loss spikes; the message
                names the last good checkpoint.
        """
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):  # an auxiliary loss may break alone
                raise ConfigError(f"the {what} became {value} at step {step}: {self._advice()}")
        limit = self._limit()
        if loss > limit:
            raise ConfigError(
                f"the loss spiked to {loss:.4f} at step {step} (the latest steps allow "
                f"{limit:.4f}): {self._advice()}; or raise spike_threshold (now "
                f"{self.config.spike_threshold:g}; 0 never stops) and resume."
            )
        self._losses.append(loss)

    def _limit(self) -> float:
        if not self.config.spike_threshold or len(self._losses) < _MIN:
            return math.inf
        middle = statistics.median(self._losses)
        spread = 1.4826 * statistics.median(abs(loss - middle) for loss in self._losses)
        return middle + self.config.spike_threshold * max(spread, _FLOOR)

    def _advice(self) -> str:
        good = newest_step(self.out)
        back = f"the last good checkpoint is {good}" if good else "no checkpoint was saved yet"
        config = self.config
        return f"{back}; try a lower lr (now {config.lr:g}) or clip (now {config.clip:g})"

    def count(self, step: int, depth_fractions: Sequence[float] | None = None) -> float:
        """FLOPs of the run, those of optimizer step `step` (from 0) included.

        Args:
            presence: (R,) share of tokens at each depth, where the step has measured it.
        """
        config = self.config
        self._step_flops = step_flops(config, self.model, step)
        if depth_fractions is not None:
            per_token = training_flops(self.model, config.sequence_length, depth_fractions)
            self._step_flops = per_token * config.tokens_per_step
        self._flops += self._step_flops
        return self._flops

    def pace(self, step_s: float) -> dict[str, float]:
        """`mfu` of the step counted last, and `memory_bytes`, the most that was in use so far.

        Model FLOPs utilization is the cost model's FLOPs per second over the rate of a large matrix
        product in the run's precision, which is measured at the first call. Memory is the
        allocator's on a GPU and the process's resident set elsewhere, which earlier runs of the
        same process may have raised.
        """
        if self._peak is None:
            bf16 = self.config.precision == "bf16"
            self._peak = gemm_peak(self.device, torch.bfloat16 if bf16 else torch.float32)
        mfu = self._step_flops / step_s / self._peak
        return {"mfu": mfu, "memory_bytes": peak_memory(self.device)}
