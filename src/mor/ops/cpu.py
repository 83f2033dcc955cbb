"""The engine's operations for CPUs, compiled by Numba: fp32 arithmetic; fp32, bf16, int8 weights.

One call runs a whole stack of layers on a team of threads (see `team`), so that Python is left once
per tick and not once per product. Each operation follows its namesake in `reference`; tests hold
them equal. Functions that begin with an underscore are one thread's part of an operation.

Shape letters as in `paged`, and M rows, K inputs, E width, I inner width, L layers.
"""

from typing import no_type_check

import numpy as np
from numba import njit, prange, set_num_threads

from mor.ops.cpu_attention import _attend, scratch_for, tiles_of
from mor.ops.micro import (
    LANES,
    PANEL,
    block,
    cycles,
    int8_steps,
    max_rows,
    panels_at_once,
)
from mor.ops.rows import abs_max_row, exp_sum_row, max_row, round_row, silu_mul_row, sum_row
from mor.ops.team import claim, counters_for, done, wait

FLOAT32, BFLOAT16, INT8 = 0, 1, 2
"""How a packed weight is stored."""
_CACHED_INPUTS = 256 * 1024  # bytes of input rows that stay in a core's cache while weights pass
_CUT = 288  # steps of a panel that stay in a core's first cache, 18 KiB
_PIECES = 2  # of a product for each thread
_ROWS = 4  # rows of an elementwise operation that make a piece
_STEPS = 16  # of a layer, at most
_SAFE = frozenset(("reassoc", "contract", "nsz", "arcp"))  # fast math, but infinities stay


def use_threads(wanted: int) -> int:
    """Let the kernels use so many threads, or as many as Numba was started with; how many."""
    from numba import config

    threads = min(wanted, int(getattr(config, "NUMBA_NUM_THREADS")))  # noqa: B009
    set_num_threads(threads)
    return threads


@njit(nogil=True, cache=True)
@no_type_check
def _panels(kind, low, high, m, k, add, x, x_bytes, w, out, o_bytes, xs, ws):
    """Panels low..high of a product, all rows; weights stream by, input rows stay in the cache."""
    per_step = int8_steps() if kind == INT8 else 1
    steps = (k + per_step - 1) // per_step
    w_bytes = PANEL * (per_step if kind == INT8 else 4 if kind == FLOAT32 else 2)
    panel, most, together = steps * w_bytes, max_rows(), panels_at_once()
    height = max(1, _CACHED_INPUTS // x_bytes // most) * most
    cut = steps  # of a panel that passes all rows before the next one comes
    if together == 1 and kind != INT8:  # a panel by itself, and sums that may be split
        cuts = (steps + _CUT - 1) // _CUT
        cut = (steps + cuts - 1) // cuts
    for top in range(0, m, height):
        count = min(height, m - top)
        blocks = (count + most - 1) // most  # of equal size: one of two rows runs slowly
        for p in range(low, high, together):
            p2 = min(p + together, high) - 1
            d = (ws + 8 * PANEL * p, ws + 8 * PANEL * p2)
            for k0 in range(0, steps, cut):
                t, plus = min(cut, steps - k0), add if k0 == 0 else 1
                b = (w + p * panel + k0 * w_bytes, w + p2 * panel + k0 * w_bytes)
                skip = t * w_bytes if together == 1 else together * panel
                ahead = (b[0] + skip, b[1] + skip)
                for j in range(blocks):
                    i = top + j * count // blocks
                    r = top + (j + 1) * count // blocks - i
                    a, s, line = x + i * x_bytes + 4 * k0, xs + 4 * i, out + i * o_bytes
                    c = (line + p * 4 * PANEL, line + p2 * 4 * PANEL)
                    if kind == FLOAT32:
                        block(
                            "float32", r, plus, a, x_bytes, b, w_bytes, ahead, t, c, o_bytes, s, d
                        )
                    elif kind == BFLOAT16:
                        block(
                            "bfloat16", r, plus, a, x_bytes, b, w_bytes, ahead, t, c, o_bytes, s, d
                        )
                    else:
                        block("int8", r, add, a, x_bytes, b, w_bytes, ahead, t, c, o_bytes, s, d)


@njit(nogil=True, cache=True, fastmath=set(_SAFE))
@no_type_check
def _quantise(counters, step, x, m, levels, xq, xs):
    """Rows of x as integers of at most `levels` either way, and the scale of each row.

    xq holds bytes: unsigned ones with 128 for 0, or int16, as the products of int8 take them.
    """
    k, whole, pieces = x.shape[1], x.shape[1] // LANES * LANES, (m + _ROWS - 1) // _ROWS
    size = 4 // int8_steps()
    piece = claim(counters, step)
    while piece < pieces:
        for i in range(piece * _ROWS, min(m, (piece + 1) * _ROWS)):
            row, top = x.ctypes.data + 4 * k * i, np.float32(0)
            if whole > 0:
                top = abs_max_row(row, whole)
            for j in range(whole, k):
                top = max(top, abs(x[i, j]))
            scale = top / np.float32(levels)
            inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
            if whole > 0:
                round_row(row, whole, inverse, xq.ctypes.data + xq.shape[1] * i)
            for j in range(whole, k + (-k & 3)):  # a step's missing k meet weights of 0
                value = np.int64(np.rint(x[i, j] * inverse)) if j < k else 0
                if size == 1:
                    xq[i, j] = value + 128
                else:
                    xq[i, 2 * j], xq[i, 2 * j + 1] = value & 255, (value >> 8) & 255
            xs[i] = scale
        done(counters, step)
        piece = claim(counters, step)
    wait(counters, step, pieces)


@njit(nogil=True, cache=True)
@no_type_check
def _linear(counters, step, threads, kind, x, m, weight, out, add, xq, xs):
    """out[:m] = x[:m] @ w.T, or += if `add`; int8 takes the rounded inputs instead of x.

    Args:
        weight: addresses of packed panels and of their scales.
    """
    k, panels = x.shape[1], out.shape[1] // PANEL
    source, row_bytes = x.ctypes.data, 4 * k
    if kind == INT8:
        source, row_bytes = xq.ctypes.data, xq.shape[1]
    together = panels_at_once()
    groups = (panels + together - 1) // together
    pieces = min(groups, _PIECES * threads)
    piece = claim(counters, step)
    while piece < pieces:
        # Larger pieces first: threads that claim in turns then have the same in the end.
        low = piece * (groups // pieces) + min(piece, groups % pieces)
        high = low + groups // pieces + (piece < groups % pieces)
        low, high = low * together, min(high * together, panels)
        _panels(
            *(kind, low, high, m, k, add, source, row_bytes, weight[0], out.ctypes.data),
            *(4 * out.shape[1], xs.ctypes.data, weight[1]),
        )
        done(counters, step)
        piece = claim(counters, step)
    wait(counters, step, pieces)


@njit(nogil=True, cache=True, fastmath=set(_SAFE))
@no_type_check
def _rms_norm(counters, step, x, m, weight, eps, out):
    """out[:m] = x[:m] / rms(x[:m]) * weight."""
    width, pieces = x.shape[1], (m + _ROWS - 1) // _ROWS
    piece = claim(counters, step)
    while piece < pieces:
        for i in range(piece * _ROWS, min(m, (piece + 1) * _ROWS)):
            total = np.float32(0)
            for j in range(width):
                total += x[i, j] * x[i, j]
            scale = np.float32(1) / np.sqrt(total / np.float32(width) + np.float32(eps))
            for j in range(width):
                out[i, j] = x[i, j] * scale * weight[j]
        done(counters, step)
        piece = claim(counters, step)
    wait(counters, step, pieces)


@njit(nogil=True, cache=True)
@no_type_check
def _silu_mul(counters, step, gate_up, m, out):
    """out[:m] = silu(gate) * up, the two halves of a row."""
    inner, pieces = out.shape[1], (m + _ROWS - 1) // _ROWS
    piece = claim(counters, step)
    while piece < pieces:
        for i in range(piece * _ROWS, min(m, (piece + 1) * _ROWS)):
            gate = gate_up.ctypes.data + 8 * i * inner
            silu_mul_row(gate, gate + 4 * inner, out.ctypes.data + 4 * i * inner, inner)
        done(counters, step)
        piece = claim(counters, step)
    wait(counters, step, pieces)


@njit(nogil=True, cache=True, fastmath=set(_SAFE))
@no_type_check
def _rotate_and_store(counters, step, q, kv, n, w, angles, positions, cells, layer, places):
    """Rotate queries (N, H * D) in place; rotate and store the first w lanes' (w, 2 * G * D)."""
    (cos, sin), (k_cells, v_cells), (cell_of, slot_of) = angles, cells, places
    size, half = v_cells.shape[3], v_cells.shape[3] // 2
    heads, groups, pieces = q.shape[1] // size, v_cells.shape[1], (n + _ROWS - 1) // _ROWS
    piece = claim(counters, step)
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
        done(counters, step)
        piece = claim(counters, step)
    wait(counters, step, pieces)


@njit(nogil=True, cache=True)
@no_type_check
def _project(counters, step, threads, kind, x, m, weight, out, add, rounded):
    """Two steps: inputs rounded if the weights are int8, and the product."""
    xq, xs = rounded
    if kind == INT8:
        _quantise(counters, step, x, m, weight[2], xq, xs)
    _linear(counters, step + 1, threads, kind, x, m, weight, out, add, xq, xs)


@njit(nogil=True, cache=True)
@no_type_check
def _layers(threads, me, counters, x, n, kind, layers, cells, lanes, angles, room, clock):
    """One thread's part of `run_layers`; thread 0 keeps the clock."""
    homes, writes, weights, norms, eps = layers
    positions, kv_len, runs, tables, cell_of, slot_of = lanes
    y, q, kv, mixed, gate_up, inner, xq, xs = room
    places, rounded = (cell_of, slot_of), (xq, xs)
    tile_runs, tile_starts = tiles_of(runs)
    scratch = scratch_for(q.shape[1], cells[1])
    products, attention = 0, 0
    began = cycles()
    for i in range(weights.shape[0]):
        a, at, step, w = weights[i], homes[i], _STEPS * i, cell_of.shape[0] * writes[i]
        _rms_norm(counters, step, x, n, norms[i, 0], eps, y)
        t0 = cycles()
        _project(counters, step + 1, threads, kind, y, n, a[0], q, 0, rounded)
        if w > 0:
            _linear(counters, step + 3, threads, kind, y, w, a[1], kv, 0, xq, xs)
        t1 = cycles()
        _rotate_and_store(counters, step + 4, q, kv, n, w, angles, positions, cells, at, places)
        t2 = cycles()
        tiles = (tile_runs, tile_starts, runs, tables, kv_len)
        _attend(counters, step + 5, q, cells, at, tiles, mixed, scratch)
        t3 = cycles()
        _project(counters, step + 6, threads, kind, mixed, n, a[2], x, 1, rounded)
        t4 = cycles()
        _rms_norm(counters, step + 8, x, n, norms[i, 1], eps, y)
        t5 = cycles()
        _project(counters, step + 9, threads, kind, y, n, a[3], gate_up, 0, rounded)
        t6 = cycles()
        _silu_mul(counters, step + 11, gate_up, n, inner)
        t7 = cycles()
        _project(counters, step + 12, threads, kind, inner, n, a[4], x, 1, rounded)
        products += t1 - t0 + t4 - t3 + t6 - t5 + cycles() - t7
        attention += t3 - t2
    if me == 0:
        clock[0] += products
        clock[1] += attention
        clock[2] += cycles() - began - products - attention


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def run_layers(threads, x, n, kind, layers, cells, lanes, angles, room, clock):
    """All layers of a stack on x[:n] in place.

    Args:
        layers: homes, writes: (L,) the layer among a page's cells that holds each layer's keys and
            values, and whether it stores them (0: they are there already); weights (L, 5, 3):
            address, scales' address, levels of q, kv, o, gate_up, down; norms (L, 2, E); epsilon.
        cells: of keys, of values.
        lanes: the fields of `paged.Lanes`.
        angles: cosines and sines by position.
        room: for n rows: normed, q, kv, mixed, gate_up, inner, rounded, scales.
        clock: (3,) cycles spent in products, in attention, in all else; added to.
    """
    counters = counters_for(_STEPS * layers[2].shape[0])
    for t in prange(threads):
        _layers(
            threads, np.int64(t), counters, x, n, kind, layers, cells, lanes, angles, room, clock
        )


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def readout(threads, kind, x, m, norm, eps, weight, y, logits, rounded):
    """logits[:m] = norm(x[:m]) @ head; `weight` as in `run_layers`."""
    counters = counters_for(3)
    for _ in prange(threads):
        _rms_norm(counters, 0, x, m, norm, eps, y)
        _project(counters, 1, threads, kind, y, m, weight, logits, 0, rounded)


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def greedy(threads, logits, m, vocabulary, tokens, logprobs):
    """The likeliest token of each row (the first of equals), and its log-probability."""
    counters = counters_for(1)
    whole = vocabulary // LANES * LANES
    for _ in prange(threads):
        i = claim(counters, 0)
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
            done(counters, 0)
            i = claim(counters, 0)
        wait(counters, 0, m)


# -- single operations, for tests and benchmarks ---------------------------------------------------


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def linear(threads, kind, x, m, weight, out, add, rounded):
    """out[:m] = x[:m] @ w.T, or += if `add`; `weight` as in `run_layers`."""
    counters = counters_for(2)
    for _ in prange(threads):
        _project(counters, 0, threads, kind, x, m, weight, out, add, rounded)


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def rms_norm(threads, x, m, weight, eps, out):
    """out[:m] = x[:m] / rms(x[:m]) * weight."""
    counters = counters_for(1)
    for _ in prange(threads):
        _rms_norm(counters, 0, x, m, weight, eps, out)


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def silu_mul(threads, gate_up, m, out):
    """out[:m] = silu(gate) * up, the two halves of a row."""
    counters = counters_for(1)
    for _ in prange(threads):
        _silu_mul(counters, 0, gate_up, m, out)


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def rotate_and_store(threads, q, kv, n, angles, positions, cells, layer, places):
    """Rotate queries in place; rotate and store keys and values where `places` says."""
    counters = counters_for(1)
    for _ in prange(threads):
        w = places[0].shape[0]
        _rotate_and_store(counters, 0, q, kv, n, w, angles, positions, cells, layer, places)


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def attend(threads, q, cells, layer, runs, tables, kv_len, out):
    """Attention of every lane to what its run's table holds; q and out are (N, H * D)."""
    counters = counters_for(1)
    for _ in prange(threads):
        tile_runs, tile_starts = tiles_of(runs)
        tiles = (tile_runs, tile_starts, runs, tables, kv_len)
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
    rows = x.shape[0] // LANES // threads * LANES
    for t in prange(threads):
        sums[t] = sum_row(x.ctypes.data + 4 * t * rows, rows)
    return sums.sum()
