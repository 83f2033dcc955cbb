"""Compiling and launching Triton kernels, in modules that are imported without Triton, too."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mor.errors import MissingExtraError

try:
    import triton
except ImportError:
    triton = None


def jit(kernel: Callable[..., Any]) -> Any:
    """triton.jit where there is Triton; without it a kernel is never launched.

    Kernels are also marked `no_type_check`: the tests' hook would wrap them, and Triton needs the
    bare function. The names are of numbers that change from call to call: nothing shall be
    compiled anew because one of them happens to be 1 or a multiple of 16.
    """
    changing = ("layer", "num_tokens", "num_runs", "num_writing", "table_width")
    return triton.jit(do_not_specialize=changing)(kernel) if triton is not None else kernel


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **options: Any) -> None:
    """Run `kernel` on the device of `like`; no grid, no launch."""
    if triton is None:
        raise MissingExtraError("triton", "gpu")
    if math.prod(grid):
        with torch.cuda.device_of(like):
            kernel[grid](*args, **options)


def power_of_two(number: int) -> int:
    """The least power of two that is not smaller than `number`."""
    return 1 << max(number - 1, 0).bit_length()
