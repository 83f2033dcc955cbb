"""glibc's allocator: memory that a training step frees is kept for the next one."""

import ctypes
import sys
from typing import Any

# glibc's malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
_MALLOC = ((-4, 0), (-1, -1), (-2, 2**28))
# M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
_GIVE_BACK = ((-4, 2**15), (-3, 2**16), (-1, 0), (-2, 0))
_PROBE = 2**26  # bytes; larger than any threshold at which glibc maps memory by itself


class _MallInfo(ctypes.Structure):
    """What glibc's mallinfo returns; the eighth is the bytes in use of its heaps, modulo 2**32."""

    _fields_ = tuple((f"field{i}", ctypes.c_uint) for i in range(10))

    @property
    def in_use(self) -> int:
        return int(self.field7)


def retain_freed_memory() -> bool:
    """Have glibc keep what tensors free, instead of giving it back; returns whether it does.

    A training step asks for the same gigabytes again and again, and the system clears every page
    that it hands out. This holds for the whole process. It is tried out, since another allocator
    may stand in for glibc's, and then glibc's options are set for nobody.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt") or not hasattr(libc, "mallinfo"):
        return False
    libc.mallinfo.restype = _MallInfo
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    if not all(libc.mallopt(option, value) == 1 for option, value in _MALLOC):
        return False
    before = libc.mallinfo().in_use
    block = libc.malloc(_PROBE)  # never written to: costs addresses, not memory
    # From the heap, not mapped by itself: what is in use grows by about the probe.
    grown = (libc.mallinfo().in_use - before) % 2**32
    libc.free(block)
    return bool(block) and _PROBE // 2 < grown < 2 * _PROBE


def return_freed_memory() -> bool:
    """Have glibc return memory of 64 KB and more when it is freed; returns whether it took that.

    For measurements of memory, since it is slower: what the process then holds is what is alive in
    it, without what malloc keeps for later.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return False
    return all(libc.mallopt(option, value) == 1 for option, value in _GIVE_BACK)
