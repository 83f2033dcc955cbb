"""Watching a run: stop when it breaks, say how fast it is, show it in TensorBoard."""

import math
import re
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from mor.errors import ConfigError, MissingExtraError
from mor.io.checkpoint import newest_step
from mor.model.config import MoRConfig
from mor.model.cost import training_flops
from mor.train.config import TrainConfig
from mor.train.course import step_flops

_WINDOW = 100  # latest losses that a new one is compared with
_LEAST = 20  # losses before the rule may speak
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
        if not self.config.spike_threshold or len(self._losses) < _LEAST:
            return math.inf
        middle = statistics.median(self._losses)
        spread = 1.4826 * statistics.median(abs(loss - middle) for loss in self._losses)
        return middle + self.config.spike_threshold * max(spread, _FLOOR)

    def _advice(self) -> str:
        good = newest_step(self.out)
        back = f"the last good checkpoint is {good}" if good else "no checkpoint was saved yet"
        config = self.config
        return f"{back}; try a lower lr (now {config.lr:g}) or clip (now {config.clip:g})"

    def count(self, step: int, presence: Sequence[float] | None = None) -> float:
        """FLOPs of the run, those of optimizer step `step` (from 0) included.

        Args:
            presence: (R,) share of tokens at each depth, where the step has measured it.
        """
        config = self.config
        self._step_flops = step_flops(config, self.model, step)
        if presence is not None:
            per_token = training_flops(self.model, config.sequence_length, presence)
            self._step_flops = per_token * config.tokens_per_step
        self._flops += self._step_flops
        return self._flops

    def pace(self, step_s: float) -> dict[str, float]:
        """`mfu` of the step counted last, and `memory_bytes`, the most that was in use so far.

        Model FLOPs utilisation is the cost model's FLOPs per second over the rate of a large matrix
        product in the run's precision, which is measured at the first call. Memory is the
        allocator's on a GPU and the process's resident set elsewhere, which earlier runs of the
        same process may have raised.
        """
        if self._peak is None:
            bf16 = self.config.precision == "bf16"
            self._peak = gemm_peak(self.device, torch.bfloat16 if bf16 else torch.float32)
        mfu = self._step_flops / step_s / self._peak
        return {"mfu": mfu, "memory_bytes": peak_memory(self.device)}


def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of three; takes a fraction of a second.

    The size doubles from 256 as long as one product will take less than 30 ms, up to 8192.
    """
    size, best = 128, 0.0
    while size < 8192 and best * 8 < 0.03:
        size *= 2
        generator = torch.Generator(device).manual_seed(0)  # the run's own numbers stay as they are
        a = torch.randn(size, size, generator=generator, device=device, dtype=dtype)
        best = min(_product_s(a) for _ in range(3))
    return 2 * size**3 / best


def _product_s(a: torch.Tensor) -> float:
    started = time.perf_counter()
    (a @ a)[0, 0].item()  # waits for the device
    return time.perf_counter() - started


def peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's memory if that was more
        kilobytes = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if kilobytes is not None:
            return int(kilobytes[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class TensorBoard:
    """The numbers of `metrics.jsonl` as TensorBoard scalars."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open the folder; what it holds after `step` is hidden, since it comes again."""
        self._writer = summary_writer()(str(folder), purge_step=step + 1)

    def append(self, row: dict[str, Any]) -> None:
        """Add a line of `metrics.jsonl`."""
        for name, value in row.items():
            if isinstance(value, (tuple, list)):
                for i, share in enumerate(value):
                    self._writer.add_scalar(f"{name}/{i}", share, row["step"])
            elif isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def summary_writer() -> Any:
    """TensorBoard's class.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "track") from error
    return SummaryWriter
