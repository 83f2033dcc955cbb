"""Threads that work through the same list of steps, sharing each step's pieces.

A parallel region for every operation costs 5 microseconds, ten times a layer, and each region ends
when its last thread does: beside a busy neighbor every one of them waits for a time slice. Here
one region spans all layers. Threads claim pieces of a step as they come, and a step is over when
its pieces are done, not when all threads have come by: who was put to sleep holds nobody up.

`counters` is int64, zeroed, two for each step: pieces claimed, pieces done.
"""

import sys
from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from mor.ops.cpu.microkernel import call

_SPINS = 2000  # looks at a counter before the core is offered to others, about 20 microseconds


@intrinsic
@no_type_check
def _add_one(typing, address):
    """The int64 at an address before one is added to it, whatever other threads do."""
    signature = types.int64(types.intp)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        kind = ir.IntType(64)
        pointer = builder.inttoptr(args[0], kind.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(kind, 1), "acq_rel")

    return signature, generate


@intrinsic
@no_type_check
def _look(typing, address):
    """The int64 at an address, and all that its writers had written before."""
    signature = types.int64(types.intp)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return signature, generate


@intrinsic
@no_type_check
def _pause(typing, offer):
    """A moment's rest; if `offer`, the core goes to another thread that wants it."""
    signature = types.void(types.intp)
    yields = sys.platform != "win32"

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        offered = builder.icmp_signed("!=", args[0], ir.Constant(ir.IntType(64), 0))
        with builder.if_else(offered) as (offers, rests):
            with offers:
                if yields:
                    call(builder, "sched_yield", ir.IntType(32))
            with rests:
                if builder.module.triple.startswith("x86"):
                    call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return signature, generate


@njit(nogil=True, cache=True)
@no_type_check
def new_counters(steps):
    """Counters of so many steps."""
    return np.zeros(2 * steps, np.int64)


@njit(nogil=True, cache=True)
@no_type_check
def next_tile(counters, step):
    """The next piece of a step that nobody has; it may be past the last one."""
    return _add_one(counters.ctypes.data + 16 * step)


@njit(nogil=True, cache=True)
@no_type_check
def finish_tile(counters, step):
    """A claimed piece is done."""
    _add_one(counters.ctypes.data + 16 * step + 8)


@njit(nogil=True, cache=True)
@no_type_check
def wait_for_tiles(counters, step, pieces):
    """Until all pieces of a step are done."""
    looks = 0
    while _look(counters.ctypes.data + 16 * step + 8) < pieces:
        looks += 1
        _pause(looks > _SPINS)
