"""What the processor that the kernels are compiled for can do.

Numba compiles for the machine it runs on, or for what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say.
"""

import functools
from typing import Any

from llvmlite import binding


@functools.cache
def features() -> frozenset[str]:
    """LLVM's names of the instruction sets, such as avx2 or avx512vnni."""
    from numba import config

    chosen: Any = getattr(config, "CPU_FEATURES", None)
    if chosen is None:
        if getattr(config, "CPU_NAME", None) not in (None, "host"):
            return frozenset()  # another processor, of which no more is known
        chosen = binding.get_host_cpu_features().flatten()
    return frozenset(name[1:] for name in str(chosen).split(",") if name.startswith("+"))


def has_wide_registers() -> bool:
    """Whether there are 32 registers of 64 bytes; otherwise 16 of 32 are reckoned with."""
    return "avx512f" in features()


def has_int8_dot() -> bool:
    """Whether one instruction sums four products of bytes in each of 16 int32."""
    return {"avx512f", "avx512vnni"} <= features()
