"""How fast a run is: `FlopsMeter` counts FLOPs and model FLOPs utilization; peak memory."""

import re
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from mor.model.config import MoRConfig
from mor.model.cost import training_flops
from mor.train.config import TrainConfig
from mor.train.schedule import step_flops


class FlopsMeter:
    """Adds up a run's training FLOPs by the cost model, and relates them to time."""

    def __init__(
        self,
        config: TrainConfig,
        model: MoRConfig,
        device: torch.device,
        rows: Iterable[dict[str, Any]] = (),
    ) -> None:
        """Start from the count of a resumed run's `metrics.jsonl`.

        Args:
            device: of which the peak rate is measured.
            rows: lines of `metrics.jsonl` so far.
        """
        self._config, self._model, self._device = config, model, device
        self._total = self._last_step = 0.0
        for row in rows:
            self._total = row.get("flops") or self._total
        self._peak: float | None = None  # FLOP/s of `gemm_peak`, once measured

    def add_step(self, step: int, depth_fractions: Sequence[float] | None = None) -> float:
        """Add optimizer step `step` (from 0); returns the FLOPs of the whole run so far.

        Args:
            depth_fractions: (R,) share of tokens at each depth, where the step has measured it;
                None takes the capacities of the step.
        """
        config = self._config
        if depth_fractions is None:
            self._last_step = step_flops(config, self._model, step)
        else:
            per_token = training_flops(self._model, config.sequence_length, depth_fractions)
            self._last_step = per_token * config.tokens_per_step
        self._total += self._last_step
        return self._total

    def mfu(self, step_s: float) -> float:
        """Model FLOPs utilization of the step added last.

        The cost model's FLOPs per second over the FLOPs per second of a large matrix product in the
        run's precision, which is measured at the first call.

        Args:
            step_s: seconds that the step took, times the number of ranks.
        """
        if self._peak is None:
            bf16 = self._config.precision == "bf16"
            self._peak = gemm_peak(self._device, torch.bfloat16 if bf16 else torch.float32)
        return self._last_step / step_s / self._peak


def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of three; measuring takes below a second.

    The size doubles from 256 as long as one product will take less than 30 ms, up to 8192.
    """
    size, best = 128, 0.0
    while size < 8192 and best * 8 < 0.03:  # twice the size is 8 times the work
        size *= 2
        generator = torch.Generator(device).manual_seed(0)  # the run's own numbers stay as they are
        a = torch.randn(size, size, generator=generator, device=device, dtype=dtype)
        best = min(_product_s(a) for _ in range(3))
    return 2 * size**3 / best


def _product_s(a: torch.Tensor) -> float:
    """Seconds of a @ a."""
    started = time.perf_counter()
    (a @ a)[0, 0].item()  # waits for the device
    return time.perf_counter() - started


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: of the CUDA allocator, or of the process's resident set.

    Both may stem from an earlier run in this process; `reset_peak_memory` resets the former.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's memory if that was more
        kilobytes = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if kilobytes is not None:
            return int(kilobytes[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` start anew on a GPU; on a CPU the system offers no such thing."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
