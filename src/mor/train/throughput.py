"""How fast a run is: FLOPs, model FLOPs utilization, memory."""

import re
import resource
import sys
import time
from pathlib import Path

import torch


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
