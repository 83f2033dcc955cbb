"""What the processor that the kernels are compiled for can do, and what the compiler may do.

Numba compiles for the machine it runs on, or for what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say.
"""

import functools
from typing import Any

from llvmlite import binding

SIMD_WIDTH = 16
"""Floats in one vector of our code: one register of AVX-512, two of AVX2, four of NEON."""

FASTMATH = frozenset(("reassoc", "contract", "nsz", "arcp"))
"""LLVM's fast-math flags for loops over floats: sums may be reordered, so that they use vectors.
Without `nnan` and `ninf`: infinities and NaN keep their meaning."""


@functools.cache
def features() -> frozenset[str]:
    """LLVM's names of the processor's instruction sets, such as avx2 or avx512vnni."""
    from numba import config

    chosen: Any = getattr(config, "CPU_FEATURES", None)
    if chosen is None:
        if getattr(config, "CPU_NAME", None) not in (None, "host"):
            return frozenset()  # another processor, of which no more is known
        chosen = binding.get_host_cpu_features().flatten()
    return frozenset(name[1:] for name in str(chosen).split(",") if name.startswith("+"))


def has_wide_registers() -> bool:
    """Whether there are 32 registers of 64 bytes; otherwise the kernels count on 16 of 32 bytes."""
    return "avx512f" in features()


def has_int8_dot() -> bool:
    """Whether one instruction sums four products of bytes in each of 16 int32 (vpdpbusd)."""
    return {"avx512f", "avx512vnni"} <= features()
