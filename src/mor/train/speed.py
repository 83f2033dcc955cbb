"""What makes a step smaller or faster on one device, put around a model from outside.

In a fixed order: a layer is compiled, activation checkpointing surrounds what is compiled, and
sharding (`parallel`) surrounds both. Checkpointing inside the compiled piece would not stand the
keys and values that a shared layer leaves behind for later recursions.
"""

import ctypes
import functools
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mor.errors import ConfigError
from mor.model.layers import Layer
from mor.model.mor import MoRModel
from mor.train.config import TrainConfig

# glibc's malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
_MALLOC = ((-4, 0), (-1, -1), (-2, 2**28))
# M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
_GIVE_BACK = ((-4, 2**15), (-3, 2**16), (-1, 0), (-2, 0))
_PROBE = 2**26


class _MallInfo(ctypes.Structure):
    """What glibc's mallinfo returns; the eighth is the bytes in use of its heaps, modulo 2**32."""

    _fields_ = tuple((f"field{i}", ctypes.c_uint) for i in range(10))

    @property
    def in_use(self) -> int:
        return int(self.field7)


def speed_up(model: MoRModel, config: TrainConfig, device: torch.device) -> None:
    """Apply `activation_checkpointing` and `compile` in place.

    Raises:
        ConfigError: `activation_checkpointing='recursion'` for a model whose recursions do not
            follow one another.
    """
    if device.type == "cpu":
        keep_freed_memory()
        # The head's gradient is there first, and takes the embedding's rows in place: else the
        # embedding would make a second array of the vocabulary's size, nearly all of it zeros.
        model.embed_tokens.sparse = model.config.tie_word_embeddings
    layers = [*model.prelude, *model.block, *model.coda]
    if config.compile and has_compiler(device):
        for layer in layers:
            # attention over shared keys and values looks at positions on the host
            assert isinstance(layer, Layer)
            part = layer.mlp if model.config.kv_strategy == "shared" else layer
            vars(part)["forward"] = torch.compile(part.forward, dynamic=True)
    if config.activation_checkpointing == "full":
        for layer in layers:
            vars(layer)["forward"] = recomputed(layer.forward)
    elif config.activation_checkpointing == "recursion":
        if model.config.sharing == "sequence":
            raise ConfigError(
                "activation_checkpointing='recursion' needs sharing='cycle'; with 'sequence' no "
                "recursion is a piece of its own: take 'full'."
            )
        vars(model)["run_block"] = recomputed(model.run_block)


def keep_freed_memory() -> bool:
    """Have glibc keep what large tensors free, for the next step's, instead of giving it back.

    A step asks for the same gigabytes again and again, and the system clears every page that it
    hands out. Of the whole process; returns whether it works, which is tried out: another
    allocator may stand in for glibc's, and then glibc's options are set for nobody.
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
    grown = (libc.mallinfo().in_use - before) % 2**32
    libc.free(block)
    return bool(block) and _PROBE // 2 < grown < 2 * _PROBE


def give_back_freed_memory() -> bool:
    """The opposite: memory of 64 KB and more goes back to the system when it is freed.

    Slower. What the process then holds is what is alive in it, without what malloc cannot use
    again; for measurements. Returns whether glibc took the options.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return False
    return all(libc.mallopt(option, value) == 1 for option, value in _GIVE_BACK)


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, which keeps its inputs only and runs again in the backward pass."""

    @functools.wraps(function)
    def run(*args: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return run


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can work here; warns in one sentence where it cannot."""
    if device.type == "cuda":
        found, needed = importlib.util.find_spec("triton") is not None, "triton"
    else:
        found = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
        needed = "a C++ compiler (g++ or clang++)"
    if not found:
        warnings.warn(
            f"compile: true needs {needed}, which is not there: training goes on without.",
            stacklevel=2,
        )
    return found
