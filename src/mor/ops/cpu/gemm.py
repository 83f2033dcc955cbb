"""Products of the CPU kernels: rows by packed weights, in fp32, bf16 or int8, and low-rank deltas.

Functions are one thread's part of an operation, see `team`. M rows, K inputs.
"""

from typing import no_type_check

import numpy as np
from numba import njit

from mor.ops.cpu.microkernel import (
    PANEL,
    SIMD_WIDTH,
    gemm_microkernel,
    int8_steps,
    microkernel_panels,
    microkernel_rows,
)
from mor.ops.cpu.simd_rows import abs_max_row, round_row
from mor.ops.cpu.work_queue import finish_tile, next_tile, wait_for_tiles

FLOAT32, BFLOAT16, INT8 = 0, 1, 2
"""How a packed weight is stored."""
_CACHED_INPUTS = 256 * 1024  # bytes of input rows that stay in a core's cache while weights pass
_CUT = 288  # steps of a panel that stay in a core's first cache, 18 KiB
_PIECES = 2  # of a product for each thread
_ROWS = 4  # rows of an elementwise operation that make a piece
_SAFE = frozenset(("reassoc", "contract", "nsz", "arcp"))  # fast math, but infinities stay


@njit(nogil=True, cache=True)
@no_type_check
def _panels(kind, low, high, m, k, add, x, x_bytes, w, out, o_bytes, xs, ws):
    """Panels low..high of a product, all rows; weights stream by, input rows stay in the cache."""
    per_step = int8_steps() if kind == INT8 else 1
    steps = (k + per_step - 1) // per_step
    w_bytes = PANEL * (per_step if kind == INT8 else 4 if kind == FLOAT32 else 2)
    panel, maximum, together = steps * w_bytes, microkernel_rows(), microkernel_panels()
    height = max(1, _CACHED_INPUTS // x_bytes // maximum) * maximum
    cut = steps  # of a panel that passes all rows before the next one comes
    if together == 1 and kind != INT8:  # a panel by itself, and sums that may be split
        cuts = (steps + _CUT - 1) // _CUT
        cut = (steps + cuts - 1) // cuts
    for top in range(0, m, height):
        count = min(height, m - top)
        blocks = (count + maximum - 1) // maximum  # of equal size: one of two rows runs slowly
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
                        gemm_microkernel(
                            "float32", r, plus, a, x_bytes, b, w_bytes, ahead, t, c, o_bytes, s, d
                        )
                    elif kind == BFLOAT16:
                        gemm_microkernel(
                            "bfloat16", r, plus, a, x_bytes, b, w_bytes, ahead, t, c, o_bytes, s, d
                        )
                    else:
                        gemm_microkernel(
                            "int8", r, add, a, x_bytes, b, w_bytes, ahead, t, c, o_bytes, s, d
                        )


@njit(nogil=True, cache=True, fastmath=set(_SAFE))
@no_type_check
def _quantize(counters, step, x, m, levels, xq, xs):
    """Rows of x as integers of at most `levels` either way, and the scale of each row.

    xq holds bytes: unsigned ones with 128 for 0, or int16, as the products of int8 take them.
    """
    k, whole, pieces = x.shape[1], x.shape[1] // SIMD_WIDTH * SIMD_WIDTH, (m + _ROWS - 1) // _ROWS
    size = 4 // int8_steps()
    piece = next_tile(counters, step)
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
        finish_tile(counters, step)
        piece = next_tile(counters, step)
    wait_for_tiles(counters, step, pieces)


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
    together = microkernel_panels()
    groups = (panels + together - 1) // together
    pieces = min(groups, _PIECES * threads)
    piece = next_tile(counters, step)
    while piece < pieces:
        # Larger pieces first: threads that claim in turns then have the same in the end.
        low = piece * (groups // pieces) + min(piece, groups % pieces)
        high = low + groups // pieces + (piece < groups % pieces)
        low, high = low * together, min(high * together, panels)
        _panels(
            *(kind, low, high, m, k, add, source, row_bytes, weight[0], out.ctypes.data),
            *(4 * out.shape[1], xs.ctypes.data, weight[1]),
        )
        finish_tile(counters, step)
        piece = next_tile(counters, step)
    wait_for_tiles(counters, step, pieces)


@njit(nogil=True, cache=True)
@no_type_check
def _project(counters, step, threads, kind, x, m, weight, out, add, rounded):
    """Two steps: inputs rounded if the weights are int8, and the product."""
    xq, xs = rounded
    if kind == INT8:
        _quantize(counters, step, x, m, weight[2], xq, xs)
    _linear(counters, step + 1, threads, kind, x, m, weight, out, add, xq, xs)


@njit(nogil=True, cache=True)
@no_type_check
def _add_deltas(counters, step, threads, x, m, deltas, width, groups, thin, out, rounded):
    """out[:m] += x[:m] @ A.T @ B.T, with a pair of matrices for each group; two steps a group.

    Args:
        deltas: (2 * groups, 3) addresses of A and B in turns, as in `_linear`; 0 groups: nothing.
        width: columns of x @ A.T; `thin` has room for them.
        groups: rows groups[g] .. groups[g + 1] are group g.
    """
    xq, xs = rounded
    for g in range(deltas.shape[0] // 2):
        low, high = min(groups[g], m), min(groups[g + 1], m)
        if low < high:
            n = high - low
            between, at = thin.reshape(-1)[: n * width].reshape(n, width), step + 2 * g
            a, b = deltas[2 * g], deltas[2 * g + 1]
            _linear(counters, at, threads, FLOAT32, x[low:high], n, a, between, 0, xq, xs)
            _linear(counters, at + 1, threads, FLOAT32, between, n, b, out[low:high], 1, xq, xs)
