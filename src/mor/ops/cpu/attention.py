"""Paged attention for CPUs, compiled by Numba; `reference.attend` says what it computes.

A tile is some lanes of one run: with one key-value head its queries are all lanes' query heads of
that head, so that keys and values are read once for them. Scores live for a block of keys at a
time (online softmax: Milakov and Gimelshein, 2018; FlashAttention).

Shape letters as in `paged`, and Q queries of a tile.
"""

import math
from typing import no_type_check

import numpy as np
from numba import njit

from mor.ops.cpu.microkernel import PANEL, gemm_microkernel, microkernel_panels, microkernel_rows
from mor.ops.cpu.simd_rows import exp_row
from mor.ops.cpu.work_queue import finish_tile, next_tile, wait_for_tiles

_KEY_BLOCK = 128  # keys whose scores are held at once
_AHEAD = 3 * PANEL  # entries from what is read to what is fetched into the cache
_LANE_TILE = 32  # lanes of one run that share a pass over its keys
_HIDDEN = -1e30  # score of an entry that a lane does not see
_SAFE = frozenset(("reassoc", "contract", "nsz", "arcp"))  # fast math, but infinities stay


@njit(nogil=True, cache=True)
@no_type_check
def _cell(base, cell_bytes, row_bytes, groups, group, table, layer, slots, entry):
    """Address of an entry's keys (row_bytes 4) or values (4 * D) in its cell."""
    cell = (table[entry // slots] + layer) * groups + group
    return base + cell * cell_bytes + row_bytes * (entry % slots)


@njit(nogil=True, cache=True)
@no_type_check
def _score(queries, rows, cells, layer, group, table, start, stop, scores):
    """scores[:rows] = queries @ keys start..stop, in whole panels."""
    _, groups, size, slots = cells[0].shape
    keys, values, cell_bytes = cells[0].ctypes.data, cells[1].ctypes.data, 4 * size * slots
    width, maximum, together = 4 * _KEY_BLOCK, microkernel_rows(), microkernel_panels()
    for at in range(start, stop, together * PANEL):
        at2 = at + (together - 1) * PANEL
        at2 = at2 if at2 < stop else at
        here = _cell(keys, cell_bytes, 4, groups, group, table, layer, slots, at)
        here2 = _cell(keys, cell_bytes, 4, groups, group, table, layer, slots, at2)
        after = at + _AHEAD
        if after + PANEL < stop:
            ahead = _cell(keys, cell_bytes, 4, groups, group, table, layer, slots, after)
            after += PANEL
            ahead2 = _cell(keys, cell_bytes, 4, groups, group, table, layer, slots, after)
        else:  # the values come next
            after = min(start + max(after - stop, 0), stop - 1)
            ahead = _cell(values, cell_bytes, 4 * size, groups, group, table, layer, slots, after)
            after = min(after + PANEL, stop - 1)
            ahead2 = _cell(values, cell_bytes, 4 * size, groups, group, table, layer, slots, after)
        for i in range(0, rows, maximum):
            r, x = min(maximum, rows - i), queries.ctypes.data + 4 * size * i
            line = scores.ctypes.data + 4 * (i * _KEY_BLOCK - start)
            w, next_w, out = (here, here2), (ahead, ahead2), (line + 4 * at, line + 4 * at2)
            gemm_microkernel(
                "float32", r, 0, x, 4 * size, w, 4 * slots, next_w, size, out, width, 0, (0, 0)
            )


@njit(nogil=True, cache=True, fastmath=set(_SAFE))
@no_type_check
def _soften(scores, rows, filled, start, context_lens, first, per_group, tops, totals, sums):
    """Scores into weights, in the light of all keys so far; earlier sums are scaled to match."""
    for i in range(rows):
        seen = min(max(context_lens[first + i // per_group] - start, 0), filled)
        if seen == 0:
            for j in range(filled):
                scores[i, j] = 0
            continue
        top = tops[i]
        for j in range(seen):
            top = max(top, scores[i, j])
        for j in range(seen, filled):
            scores[i, j] = np.float32(_HIDDEN)
        total = exp_row(scores.ctypes.data + 4 * i * _KEY_BLOCK, filled, top)
        if top > tops[i]:
            shrink = np.float32(math.exp(tops[i] - top))
            totals[i] *= shrink
            for d in range(sums.shape[1]):
                sums[i, d] *= shrink
            tops[i] = top
        totals[i] += total


@njit(nogil=True, cache=True)
@no_type_check
def _mix(scores, rows, cells, layer, group, table, start, stop, reach, sums):
    """sums[:rows] += weights @ values start..stop, in whole panels."""
    _, groups, slots, size = cells[1].shape
    keys, values, cell_bytes = cells[0].ctypes.data, cells[1].ctypes.data, 4 * size * slots
    row, width, maximum, together = (
        4 * size,
        4 * _KEY_BLOCK,
        microkernel_rows(),
        microkernel_panels(),
    )
    for at in range(start, stop, PANEL):
        # Entries behind `stop` may never have been written: not even with weight 0 are they read.
        num_entries = min(PANEL, stop - at)
        here = _cell(values, cell_bytes, row, groups, group, table, layer, slots, at)
        after = at + _AHEAD
        if after < stop:
            ahead = _cell(values, cell_bytes, row, groups, group, table, layer, slots, after)
        elif after < reach:  # the next keys come next
            ahead = _cell(keys, cell_bytes, 4, groups, group, table, layer, slots, after)
        else:  # the next head's keys come next
            other, after = min(group + 1, groups - 1), min(after - reach, reach - 1)
            ahead = _cell(keys, cell_bytes, 4, groups, other, table, layer, slots, after)
        for d in range(0, size, together * PANEL):
            d2 = d + (together - 1) * PANEL
            d2 = d2 if d2 < size else d
            for i in range(0, rows, maximum):
                r = min(maximum, rows - i)
                x = scores.ctypes.data + 4 * (i * _KEY_BLOCK + at - start)
                line = sums.ctypes.data + 4 * i * size
                w, next_w = (here + 4 * d, here + 4 * d2), (ahead + 4 * d, ahead + 4 * d2)
                out = (line + 4 * d, line + 4 * d2)
                gemm_microkernel(
                    "float32", r, 1, x, width, w, row, next_w, num_entries, out, row, 0, (0, 0)
                )


@njit(nogil=True, cache=True, fastmath=set(_SAFE))
@no_type_check
def _tile(q, cells, layer, first, last, group, table, context_lens, out, scratch):
    """Attention of lanes first..last of one run, for the query heads of one key-value head."""
    _, groups, size, _ = cells[0].shape
    per_group = q.shape[1] // size // groups
    rows, maximum = (last - first) * per_group, _LANE_TILE * per_group
    queries = scratch[: maximum * size].reshape(maximum, size)
    sums = scratch[maximum * size : 2 * maximum * size].reshape(maximum, size)
    rest = scratch[2 * maximum * size :]
    scores = rest[: maximum * _KEY_BLOCK].reshape(maximum, _KEY_BLOCK)
    tops = rest[maximum * _KEY_BLOCK : maximum * (_KEY_BLOCK + 1)]
    totals = rest[maximum * (_KEY_BLOCK + 1) : maximum * (_KEY_BLOCK + 2)]
    scale = np.float32(1 / math.sqrt(size))
    for i in range(rows):
        lane, head = first + i // per_group, group * per_group + i % per_group
        for d in range(size):
            queries[i, d] = q[lane, head * size + d] * scale
            sums[i, d] = 0
        tops[i], totals[i] = np.float32(_HIDDEN), 0
    reach = context_lens[last - 1]
    for start in range(0, reach, _KEY_BLOCK):
        stop = min(reach, start + _KEY_BLOCK)
        filled = (stop - start + PANEL - 1) // PANEL * PANEL
        _score(queries, rows, cells, layer, group, table, start, stop, scores)
        _soften(scores, rows, filled, start, context_lens, first, per_group, tops, totals, sums)
        _mix(scores, rows, cells, layer, group, table, start, stop, reach, sums)
    for i in range(rows):
        lane, head = first + i // per_group, group * per_group + i % per_group
        inverse = np.float32(1) / totals[i]
        for d in range(size):
            out[lane, head * size + d] = sums[i, d] * inverse


@njit(nogil=True, cache=True)
@no_type_check
def tiles_of(runs):
    """Run and first lane of every tile."""
    count = 0
    for u in range(runs.shape[0] - 1):
        count += (runs[u + 1] - runs[u] + _LANE_TILE - 1) // _LANE_TILE
    tile_runs, tile_starts = np.empty(count, np.int64), np.empty(count, np.int64)
    count = 0
    for u in range(runs.shape[0] - 1):
        for first in range(runs[u], runs[u + 1], _LANE_TILE):
            tile_runs[count], tile_starts[count] = u, first
            count += 1
    return tile_runs, tile_starts


@njit(nogil=True, cache=True)
@no_type_check
def scratch_for(width, v_cells):
    """A thread's room for one tile; width is H * D."""
    groups, size = v_cells.shape[1], v_cells.shape[3]
    per_group = width // size // groups
    return np.empty(_LANE_TILE * per_group * (2 * size + _KEY_BLOCK + 2), np.float32)


@njit(nogil=True, cache=True)
@no_type_check
def _attend(counters, step, q, cells, layer, tiles, out, scratch):
    """One thread's part: a piece is a tile, one key-value head after another."""
    tile_runs, tile_starts, runs, tables, context_lens = tiles
    groups, pieces = cells[1].shape[1], tile_runs.shape[0]
    piece = next_tile(counters, step)
    while piece < pieces:
        u, first = tile_runs[piece], tile_starts[piece]
        last = min(first + _LANE_TILE, runs[u + 1])
        for group in range(groups):
            _tile(q, cells, layer, first, last, group, tables[u], context_lens, out, scratch)
        finish_tile(counters, step)
        piece = next_tile(counters, step)
    wait_for_tiles(counters, step, pieces)
