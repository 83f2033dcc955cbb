"""What a layer does to each row by itself: norm, activation, rotation and storing.

Each function does one thread's part of a stage (see `work_queue`); a tile is some rows.
Shape letters as in `mor.ops.paged`.
"""

from typing import no_type_check

import numpy as np
from numba import njit

from mor.ops.cpu.cpu_features import FASTMATH
from mor.ops.cpu.simd_rows import silu_mul_row
from mor.ops.cpu.work_queue import (
    finish_tile,
    next_tile,
    num_row_tiles,
    rows_of_tile,
    wait_for_tiles,
)


@njit(nogil=True, cache=True, fastmath=set(FASTMATH))
@no_type_check
def _rms_norm(queue, stage, x, weight, eps, out):
    """out = x / rms(x) * weight, for all rows of x; out may have more."""
    num_rows, width = x.shape
    num_tiles = num_row_tiles(num_rows)
    tile = next_tile(queue, stage)
    while tile < num_tiles:
        for i in rows_of_tile(tile, num_rows):
            total = np.float32(0)
            for j in range(width):
                total += x[i, j] * x[i, j]
            scale = np.float32(1) / np.sqrt(total / np.float32(width) + np.float32(eps))
            for j in range(width):
                out[i, j] = x[i, j] * scale * weight[j]
        finish_tile(queue, stage)
        tile = next_tile(queue, stage)
    wait_for_tiles(queue, stage, num_tiles)


@njit(nogil=True, cache=True)
@no_type_check
def _silu_mul(queue, stage, gate_up, num_rows, out):
    """out[:num_rows] = silu(gate) * up, the two halves of a row."""
    inner, num_tiles = out.shape[1], num_row_tiles(num_rows)
    tile = next_tile(queue, stage)
    while tile < num_tiles:
        for i in rows_of_tile(tile, num_rows):
            gate = gate_up.ctypes.data + 8 * i * inner  # a row has 2 * inner numbers of 4 bytes
            silu_mul_row(gate, gate + 4 * inner, out.ctypes.data + 4 * i * inner, inner)
        finish_tile(queue, stage)
        tile = next_tile(queue, stage)
    wait_for_tiles(queue, stage, num_tiles)


@njit(nogil=True, cache=True, fastmath=set(FASTMATH))
@no_type_check
def _rotate_and_store(queue, stage, qkv, layer_cells, batch, cos_sin):
    """Rotate all queries in place; rotate and store the first W tokens' keys, store their values.

    Args:
        layer_cells: `KVCells`, and which of a page's cells is meant.
    """
    (q, kv), (cells, layer), (cos, sin) = qkv, layer_cells, cos_sin
    _, num_kv_heads, _, size = cells.v.shape
    num_tokens, num_writing, half, heads = q.shape[0], kv.shape[0], size // 2, q.shape[1] // size
    num_tiles = num_row_tiles(num_tokens)
    tile = next_tile(queue, stage)
    while tile < num_tiles:
        for i in rows_of_tile(tile, num_tokens):
            at = batch.positions[i]
            # First and second half of a head form the pairs (Llama): d with half + d.
            for h in range(heads):
                for d in range(half):
                    a, b = q[i, h * size + d], q[i, h * size + half + d]
                    q[i, h * size + d] = a * cos[at, d] - b * sin[at, d]
                    q[i, h * size + half + d] = b * cos[at, d] + a * sin[at, d]
            if i < num_writing:
                cell, slot = batch.slot_cells[i] + layer, batch.slot_offsets[i]
                # Keys are stored turned, (D, S); values, the second half of a row, (S, D).
                for g in range(num_kv_heads):
                    for d in range(half):
                        a, b = kv[i, g * size + d], kv[i, g * size + half + d]
                        cells.k[cell, g, d, slot] = a * cos[at, d] - b * sin[at, d]
                        cells.k[cell, g, half + d, slot] = b * cos[at, d] + a * sin[at, d]
                    for d in range(size):
                        cells.v[cell, g, slot, d] = kv[i, (num_kv_heads + g) * size + d]
        finish_tile(queue, stage)
        tile = next_tile(queue, stage)
    wait_for_tiles(queue, stage, num_tiles)
