"""The engine's operations for CPUs, compiled by Numba: fp32 arithmetic; fp32, bf16, int8 weights.

One call runs a whole stack of layers on a team of threads (see `team`), so that Python is left once
per tick and not once per product. Each operation follows its namesake in `reference`; tests hold
them equal. Functions that begin with an underscore are one thread's part of an operation.

Shape letters as in `paged`, and M rows, K inputs, E width, I inner width, L layers.
"""

from typing import no_type_check

import numpy as np
from numba import njit, prange, set_num_threads

from mor.ops.cpu.attention import _attend, scratch_for, tiles_of
from mor.ops.cpu.gemm import _add_deltas, _linear, _project
from mor.ops.cpu.microkernel import SIMD_WIDTH, cycles
from mor.ops.cpu.simd_rows import exp_sum_row, max_row, silu_mul_row, sum_row
from mor.ops.cpu.work_queue import finish_tile, new_counters, next_tile, wait_for_tiles

_ROWS = 4  # rows of an elementwise operation that make a piece
_STEPS = 16  # of a layer, at most
_SAFE = frozenset(("reassoc", "contract", "nsz", "arcp"))  # fast math, but infinities stay


def use_threads(wanted: int) -> int:
    """Let the kernels use so many threads, or as many as Numba was started with; how many."""
    from numba import config

    threads = min(wanted, int(getattr(config, "NUMBA_NUM_THREADS")))  # noqa: B009
    set_num_threads(threads)
    return threads


@njit(nogil=True, cache=True, fastmath=set(_SAFE))
@no_type_check
def _rms_norm(counters, step, x, m, weight, eps, out):
    """out[:m] = x[:m] / rms(x[:m]) * weight."""
    width, pieces = x.shape[1], (m + _ROWS - 1) // _ROWS
    piece = next_tile(counters, step)
    while piece < pieces:
        for i in range(piece * _ROWS, min(m, (piece + 1) * _ROWS)):
            total = np.float32(0)
            for j in range(width):
                total += x[i, j] * x[i, j]
            scale = np.float32(1) / np.sqrt(total / np.float32(width) + np.float32(eps))
            for j in range(width):
                out[i, j] = x[i, j] * scale * weight[j]
        finish_tile(counters, step)
        piece = next_tile(counters, step)
    wait_for_tiles(counters, step, pieces)


@njit(nogil=True, cache=True)
@no_type_check
def _silu_mul(counters, step, gate_up, m, out):
    """out[:m] = silu(gate) * up, the two halves of a row."""
    inner, pieces = out.shape[1], (m + _ROWS - 1) // _ROWS
    piece = next_tile(counters, step)
    while piece < pieces:
        for i in range(piece * _ROWS, min(m, (piece + 1) * _ROWS)):
            gate = gate_up.ctypes.data + 8 * i * inner
            silu_mul_row(gate, gate + 4 * inner, out.ctypes.data + 4 * i * inner, inner)
        finish_tile(counters, step)
        piece = next_tile(counters, step)
    wait_for_tiles(counters, step, pieces)


@njit(nogil=True, cache=True, fastmath=set(_SAFE))
@no_type_check
def _rotate_and_store(counters, step, q, kv, n, w, angles, positions, cells, layer, places):
    """Rotate queries (N, H * D) in place; rotate and store the first w lanes' (w, 2 * G * D)."""
    (cos, sin), (k_cells, v_cells), (cell_of, slot_of) = angles, cells, places
    size, half = v_cells.shape[3], v_cells.shape[3] // 2
    heads, groups, pieces = q.shape[1] // size, v_cells.shape[1], (n + _ROWS - 1) // _ROWS
    piece = next_tile(counters, step)
    while piece < pieces:
        for i in range(piece * _ROWS, min(n, (piece + 1) * _ROWS)):
            at = positions[i]
            for h in range(heads):
                for d in range(half):
                    a, b = q[i, h * size + d], q[i, h * size + half + d]
                    q[i, h * size + d] = a * cos[at, d] - b * sin[at, d]
                    q[i, h * size + half + d] = b * cos[at, d] + a * sin[at, d]
            if i < w:
                cell, slot = cell_of[i] + layer, slot_of[i]
                for g in range(groups):
                    for d in range(half):
                        a, b = kv[i, g * size + d], kv[i, g * size + half + d]
                        k_cells[cell, g, d, slot] = a * cos[at, d] - b * sin[at, d]
                        k_cells[cell, g, half + d, slot] = b * cos[at, d] + a * sin[at, d]
                    for d in range(size):
                        v_cells[cell, g, slot, d] = kv[i, (groups + g) * size + d]
        finish_tile(counters, step)
        piece = next_tile(counters, step)
    wait_for_tiles(counters, step, pieces)


@njit(nogil=True, cache=True)
@no_type_check
def _layers(threads, me, counters, x, n, kind, layers, cells, metadata, angles, room, clock):
    """One thread's part of `run_layers`; thread 0 keeps the clock."""
    homes, writes, weights, norms, eps, deltas, widths = layers
    positions, context_lens, runs, tables, cell_of, slot_of, groups = metadata
    y, q, kv, mixed, gate_up, inner, xq, xs, thin = room
    first, apart = _STEPS * weights.shape[0], deltas.shape[2]  # steps of deltas come after all
    places, rounded = (cell_of, slot_of), (xq, xs)
    tile_runs, tile_starts = tiles_of(runs)
    scratch = scratch_for(q.shape[1], cells[1])
    products, attention = 0, 0
    began = cycles()
    for i in range(weights.shape[0]):
        a, at, step, w = weights[i], homes[i], _STEPS * i, cell_of.shape[0] * writes[i]
        d, extra = deltas[i], first + 5 * apart * i
        _rms_norm(counters, step, x, n, norms[i, 0], eps, y)
        t0 = cycles()
        _project(counters, step + 1, threads, kind, y, n, a[0], q, 0, rounded)
        _add_deltas(counters, extra, threads, y, n, d[0], widths[0], groups, thin, q, rounded)
        if w > 0:
            _linear(counters, step + 3, threads, kind, y, w, a[1], kv, 0, xq, xs)
            _add_deltas(
                *(counters, extra + apart, threads, y, w, d[1], widths[1], groups, thin, kv),
                rounded,
            )
        t1 = cycles()
        _rotate_and_store(counters, step + 4, q, kv, n, w, angles, positions, cells, at, places)
        t2 = cycles()
        tiles = (tile_runs, tile_starts, runs, tables, context_lens)
        _attend(counters, step + 5, q, cells, at, tiles, mixed, scratch)
        t3 = cycles()
        _project(counters, step + 6, threads, kind, mixed, n, a[2], x, 1, rounded)
        _add_deltas(
            *(counters, extra + 2 * apart, threads, mixed, n, d[2], widths[2], groups, thin, x),
            rounded,
        )
        t4 = cycles()
        _rms_norm(counters, step + 8, x, n, norms[i, 1], eps, y)
        t5 = cycles()
        _project(counters, step + 9, threads, kind, y, n, a[3], gate_up, 0, rounded)
        _add_deltas(
            *(counters, extra + 3 * apart, threads, y, n, d[3], widths[3], groups, thin, gate_up),
            rounded,
        )
        t6 = cycles()
        _silu_mul(counters, step + 11, gate_up, n, inner)
        t7 = cycles()
        _project(counters, step + 12, threads, kind, inner, n, a[4], x, 1, rounded)
        _add_deltas(
            *(counters, extra + 4 * apart, threads, inner, n, d[4], widths[4], groups, thin, x),
            rounded,
        )
        products += t1 - t0 + t4 - t3 + t6 - t5 + cycles() - t7
        attention += t3 - t2
    if me == 0:
        clock[0] += products
        clock[1] += attention
        clock[2] += cycles() - began - products - attention


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def run_layers(threads, x, n, kind, layers, cells, metadata, angles, room, clock):
    """All layers of a stack on x[:n] in place.

    Args:
        layers: homes, writes: (L,) the layer among a page's cells that holds each layer's keys and
            values, and whether it stores them (0: they are there already); weights (L, 5, 3):
            address, scales' address, levels of q, kv, o, gate_up, down; norms (L, 2, E); epsilon;
            deltas (L, 5, 2 * groups, 3) and widths (5,), see `_add_deltas`.
        cells: of keys, of values.
        lanes: the fields of `paged.Lanes` that are arrays, and the groups.
        angles: cosines and sines by position.
        room: for n rows: normed, q, kv, mixed, gate_up, inner, rounded, scales, deltas' inside.
        clock: (3,) cycles spent in products, in attention, in all else; added to.
    """
    counters = new_counters((_STEPS + 5 * layers[5].shape[2]) * layers[2].shape[0])
    for t in prange(threads):
        _layers(
            threads, np.int64(t), counters, x, n, kind, layers, cells, metadata, angles, room, clock
        )


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def readout(threads, kind, x, m, norm, eps, weight, y, logits, rounded):
    """logits[:m] = norm(x[:m]) @ head; `weight` as in `run_layers`."""
    counters = new_counters(3)
    for _ in prange(threads):
        _rms_norm(counters, 0, x, m, norm, eps, y)
        _project(counters, 1, threads, kind, y, m, weight, logits, 0, rounded)


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def greedy(threads, logits, m, vocabulary, tokens, logprobs):
    """The likeliest token of each row (the first of equals), and its log-probability."""
    counters = new_counters(1)
    whole = vocabulary // SIMD_WIDTH * SIMD_WIDTH
    for _ in prange(threads):
        i = next_tile(counters, 0)
        while i < m:
            row = logits.ctypes.data + 4 * logits.shape[1] * i
            top = logits[i, 0]
            if whole > 0:
                top = max_row(row, whole)
            for j in range(whole, vocabulary):
                top = max(top, logits[i, j])
            total = np.float32(0)
            if whole > 0:
                total = exp_sum_row(row, whole, top)
            for j in range(whole, vocabulary):
                total += np.exp(logits[i, j] - top)
            best = 0
            while best < vocabulary - 1 and logits[i, best] != top:
                best += 1
            tokens[i], logprobs[i] = best, -np.log(total)
            finish_tile(counters, 0)
            i = next_tile(counters, 0)
        wait_for_tiles(counters, 0, m)


# -- single operations, for tests and benchmarks ---------------------------------------------------


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def linear(threads, kind, x, m, weight, out, add, rounded):
    """out[:m] = x[:m] @ w.T, or += if `add`; `weight` as in `run_layers`."""
    counters = new_counters(2)
    for _ in prange(threads):
        _project(counters, 0, threads, kind, x, m, weight, out, add, rounded)


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def rms_norm(threads, x, m, weight, eps, out):
    """out[:m] = x[:m] / rms(x[:m]) * weight."""
    counters = new_counters(1)
    for _ in prange(threads):
        _rms_norm(counters, 0, x, m, weight, eps, out)


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def silu_mul(threads, gate_up, m, out):
    """out[:m] = silu(gate) * up, the two halves of a row."""
    counters = new_counters(1)
    for _ in prange(threads):
        _silu_mul(counters, 0, gate_up, m, out)


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def rotate_and_store(threads, q, kv, n, angles, positions, cells, layer, places):
    """Rotate queries in place; rotate and store keys and values where `places` says."""
    counters = new_counters(1)
    for _ in prange(threads):
        w = places[0].shape[0]
        _rotate_and_store(counters, 0, q, kv, n, w, angles, positions, cells, layer, places)


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def attend(threads, q, cells, layer, runs, tables, context_lens, out):
    """Attention of every lane to what its run's table holds; q and out are (N, H * D)."""
    counters = new_counters(1)
    for _ in prange(threads):
        tile_runs, tile_starts = tiles_of(runs)
        tiles = (tile_runs, tile_starts, runs, tables, context_lens)
        _attend(counters, 0, q, cells, layer, tiles, out, scratch_for(q.shape[1], cells[1]))


@njit(nogil=True, cache=True)
@no_type_check
def read_cycles():
    """The clock that `run_layers` reads."""
    return cycles()


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def read_all(threads, x):
    """Read an array once, on all threads, and give back a sum: how fast memory can be read."""
    sums = np.zeros(threads, np.float32)
    rows = x.shape[0] // SIMD_WIDTH // threads * SIMD_WIDTH
    for t in prange(threads):
        sums[t] = sum_row(x.ctypes.data + 4 * t * rows, rows)
    return sums.sum()
