"""Threads that work through the same list of stages, sharing each stage's tiles.

A parallel region for every operation costs 5 microseconds, ten times a layer, and each region ends
when its last thread does: beside a busy neighbor every one of them waits for a time slice. Here
one region spans all layers. Threads claim tiles of a stage as they come, and a stage is over when
its tiles are done, not when all threads have come by: who was put to sleep holds nobody up.

Every operation has this form:

    tile = next_tile(queue, stage)
    while tile < num_tiles:
        ...                                    # work on this tile; nobody else has it
        finish_tile(queue, stage)
        tile = next_tile(queue, stage)
    wait_for_tiles(queue, stage, num_tiles)    # now all tiles are there, for every thread to read

Why two counters a stage are enough. Claiming is an atomic addition, so two threads never get the
same tile. Finishing is an atomic addition with release order, made after the tile's stores; waiting
is a load with acquire order. A thread that reads `num_tiles` there has seen the last of those
additions, and with it, since atomic additions to one counter form one release sequence, all stores
of all tiles. No lock and no other fence is needed, and as each stage has counters of its own, none
is ever set back: a late thread finds a finished stage's counter past its end and goes on.
"""

import sys
from typing import Any, NamedTuple, no_type_check

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from mor.ops.cpu.microkernel import call

ROWS_PER_TILE = 4
"""Rows of a tile of an elementwise operation."""
_SPINS = 2000  # looks at a counter before the core is offered to others, about 20 microseconds
_STAGE_BYTES = 16  # two int64 counters


class WorkQueue(NamedTuple):
    """What the threads of one call share."""

    counters: np.ndarray
    """(2 * stages,) int64, zeros at first: of each stage the tiles claimed, and those done."""
    num_threads: int


@intrinsic
@no_type_check
def _fetch_add_one(typing, address):
    """The int64 at an address before one is added to it, atomically."""
    signature = types.int64(types.intp)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        int64 = ir.IntType(64)
        pointer = builder.inttoptr(args[0], int64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(int64, 1), "acq_rel")

    return signature, generate


@intrinsic
@no_type_check
def _load_acquire(typing, address):
    """The int64 at an address; what its writers wrote before it is visible afterwards."""
    signature = types.int64(types.intp)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return signature, generate


@intrinsic
@no_type_check
def _pause(typing, yields):
    """Rest for some cycles; if `yields`, offer the core to another thread that wants it."""
    signature = types.void(types.intp)
    has_sched_yield = sys.platform != "win32"

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        condition = builder.icmp_signed("!=", args[0], ir.Constant(ir.IntType(64), 0))
        with builder.if_else(condition) as (then, otherwise):
            with then:
                if has_sched_yield:
                    call(builder, "sched_yield", ir.IntType(32))
            with otherwise:
                if builder.module.triple.startswith("x86"):
                    call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return signature, generate


@njit(nogil=True, cache=True)
@no_type_check
def new_counters(num_stages):
    """Counters of so many stages."""
    return np.zeros(2 * num_stages, np.int64)


@njit(nogil=True, cache=True)
@no_type_check
def next_tile(queue, stage):
    """The next tile of a stage that nobody has; it may be past the last one."""
    return _fetch_add_one(queue.counters.ctypes.data + _STAGE_BYTES * stage)


@njit(nogil=True, cache=True)
@no_type_check
def finish_tile(queue, stage):
    """Count a claimed tile as done; all that was stored for it comes before."""
    _fetch_add_one(queue.counters.ctypes.data + _STAGE_BYTES * stage + 8)


@njit(nogil=True, cache=True)
@no_type_check
def wait_for_tiles(queue, stage, num_tiles):
    """Return when all tiles of a stage are done."""
    looks = 0
    # Spin at first: most waits are shorter than a switch to another thread.
    while _load_acquire(queue.counters.ctypes.data + _STAGE_BYTES * stage + 8) < num_tiles:
        looks += 1
        _pause(looks > _SPINS)


@njit(nogil=True, cache=True)
@no_type_check
def num_row_tiles(num_rows):
    """Tiles of ROWS_PER_TILE rows."""
    return (num_rows + ROWS_PER_TILE - 1) // ROWS_PER_TILE


@njit(nogil=True, cache=True)
@no_type_check
def rows_of_tile(tile, num_rows):
    """The rows of a tile of ROWS_PER_TILE rows, as a range."""
    return range(tile * ROWS_PER_TILE, min(num_rows, (tile + 1) * ROWS_PER_TILE))
