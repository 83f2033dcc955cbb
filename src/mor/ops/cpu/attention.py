"""Paged attention for CPUs, compiled by Numba; `reference.attend` says what it computes.

A tile of queries is up to _TOKENS_PER_TILE tokens of one sequence, with all query heads of one
key-value head, so that keys and values are read once for all of them (grouped-query attention).
Scores live for a block of keys at a time (online softmax: Milakov and Gimelshein, 2018, arXiv
1805.02867; FlashAttention: Dao et al., 2022, arXiv 2205.14135):

                 keys 0 ..    128 ..     256 ..           for each block of keys:
    queries    +----------+----------+----------+           scores  = queries @ keys
    (tokens x  |  block 0 |  block 1 |  block 2 |           weights = exp(scores - row_max)
    heads of a |          |          |          |           row_sum += weights' sums
    kv head)   +----------+----------+----------+           acc     += weights @ values
                                                          in the end: out = acc / row_sum

In a cell of the pool keys lie as (D, S) and values as (S, D), so that both products meet a cell as
a panel of weights: S neighboring keys, or D neighboring numbers of a value.

Shape letters as in `mor.ops.paged`, and Q queries of a tile.
"""

import math
from typing import NamedTuple, no_type_check

import numpy as np
from numba import njit

from mor.ops.cpu.cpu_features import FASTMATH
from mor.ops.cpu.microkernel import (
    InputRows,
    OutputBlock,
    PanelPair,
    gemm_microkernel,
    microkernel_panels,
    microkernel_rows,
)
from mor.ops.cpu.packed_weights import PANEL
from mor.ops.cpu.records import KVCells
from mor.ops.cpu.simd_rows import exp_row
from mor.ops.cpu.work_queue import finish_tile, next_tile, wait_for_tiles

_KEY_BLOCK = 128  # keys whose scores are held at once
_PREFETCH_DISTANCE = 3 * PANEL  # entries from what is read to what is fetched into the cache
_TOKENS_PER_TILE = 32  # tokens of one sequence that share a pass over its keys
_MASKED = -1e30  # score of an entry that a token does not see; finite, so that exp is plain 0


class Attention(NamedTuple):
    """One layer's attention: where queries come from, and where results go."""

    q: np.ndarray
    """(N, H * D) rotated queries."""
    cells: KVCells
    layer: int
    """Which of a page's cells it reads."""
    out: np.ndarray
    """(N, H * D)."""


class TileIndex(NamedTuple):
    """Where each tile of a batch begins."""

    sequences: np.ndarray
    """(tiles,) row of `query_start_loc` and of `page_tables`."""
    first_tokens: np.ndarray
    """(tiles,)."""


class QueryTile(NamedTuple):
    """Tokens first .. end - 1 of one sequence, for the query heads of one key-value head."""

    first: int
    end: int
    kv_head: int
    queries_per_token: int
    """Query heads of a key-value head; query i belongs to token first + i // queries_per_token."""
    max_context_len: int
    """Entries that the last token sees: it sees most."""


class SequencePages(NamedTuple):
    """Where one sequence's keys and values lie, in one layer."""

    keys: int
    """Address of the pool's keys."""
    values: int
    page_table: np.ndarray
    """(P,) cells of its pages, for layer 0."""
    layer: int
    num_kv_heads: int
    head_dim: int
    block_size: int


class TileScratch(NamedTuple):
    """A thread's memory for one tile, float32."""

    queries: np.ndarray
    """(Q, D), scaled."""
    scores: np.ndarray
    """(Q, _KEY_BLOCK), then weights."""
    acc: np.ndarray
    """(Q, D) sums of weights by values so far."""
    row_max: np.ndarray
    """(Q,) largest score so far."""
    row_sum: np.ndarray
    """(Q,) sum of weights so far."""


@njit(nogil=True, cache=True)
@no_type_check
def _key_address(pages, kv_head, entry):
    """Address of an entry's key: its first number; the next one lies block_size numbers on."""
    cell = (
        pages.page_table[entry // pages.block_size] + pages.layer
    ) * pages.num_kv_heads + kv_head
    cell_bytes = 4 * pages.head_dim * pages.block_size
    return pages.keys + cell * cell_bytes + 4 * (entry % pages.block_size)


@njit(nogil=True, cache=True)
@no_type_check
def _value_address(pages, kv_head, entry):
    """Address of an entry's value: head_dim neighboring numbers."""
    cell = (
        pages.page_table[entry // pages.block_size] + pages.layer
    ) * pages.num_kv_heads + kv_head
    cell_bytes = 4 * pages.head_dim * pages.block_size
    return pages.values + cell * cell_bytes + 4 * pages.head_dim * (entry % pages.block_size)


@njit(nogil=True, cache=True)
@no_type_check
def _scores(tile, pages, start, stop, scratch):
    """scores[:, : stop - start] = queries @ keys start .. stop - 1, in whole panels.

    A panel's keys behind `stop` may never have been written: their scores mean nothing.
    """
    row_bytes, score_bytes = 4 * pages.head_dim, 4 * _KEY_BLOCK
    num_rows = (tile.end - tile.first) * tile.queries_per_token
    max_rows, num_panels = microkernel_rows(), microkernel_panels()
    for entry in range(start, stop, num_panels * PANEL):
        # Two panels may lie in two pages: each has an address of its own.
        second = entry + (num_panels - 1) * PANEL
        second = second if second < stop else entry  # the same panel again: an odd one
        # Prefetch in the order in which things are read: keys of this block, then its values.
        ahead = entry + _PREFETCH_DISTANCE
        if ahead + PANEL < stop:
            prefetch_first = _key_address(pages, tile.kv_head, ahead)
            prefetch_second = _key_address(pages, tile.kv_head, ahead + PANEL)
        else:
            ahead = min(start + max(ahead - stop, 0), stop - 1)
            prefetch_first = _value_address(pages, tile.kv_head, ahead)
            ahead = min(ahead + PANEL, stop - 1)
            prefetch_second = _value_address(pages, tile.kv_head, ahead)
        # Keys of a cell are (D, S): a step of the panel is one number of 16 neighboring keys.
        panels = PanelPair(
            first=_key_address(pages, tile.kv_head, entry),
            second=_key_address(pages, tile.kv_head, second),
            step_bytes=4 * pages.block_size,
            num_steps=pages.head_dim,
            prefetch_first=prefetch_first,
            prefetch_second=prefetch_second,
            scales_first=0,
            scales_second=0,
        )
        for i in range(0, num_rows, max_rows):
            out = scratch.scores.ctypes.data + score_bytes * i
            inputs = InputRows(
                address=scratch.queries.ctypes.data + row_bytes * i,
                row_bytes=row_bytes,
                num_rows=min(max_rows, num_rows - i),
                scales=0,
            )
            outputs = OutputBlock(
                first=out + 4 * (entry - start),
                second=out + 4 * (second - start),
                row_bytes=score_bytes,
                add=0,
            )
            gemm_microkernel("float32", inputs, panels, outputs)


@njit(nogil=True, cache=True, fastmath=set(FASTMATH))
@no_type_check
def _online_softmax(tile, context_lens, start, num_scores, scratch):
    """Scores of keys from `start` on into weights exp(score - row_max); updates row_max, row_sum.

    Where a row's maximum grows, its earlier sums are scaled to the new one.

    Args:
        num_scores: columns of `scores` that were computed: whole panels.
    """
    scores, acc = scratch.scores, scratch.acc
    for i in range((tile.end - tile.first) * tile.queries_per_token):
        context_len = context_lens[tile.first + i // tile.queries_per_token]
        num_seen = min(max(context_len - start, 0), num_scores)
        if num_seen == 0:  # an early token of the tile, a late block: weights of 0
            for j in range(num_scores):
                scores[i, j] = 0
            continue
        old_max = scratch.row_max[i]
        new_max = old_max
        for j in range(num_seen):
            new_max = max(new_max, scores[i, j])
        for j in range(num_seen, num_scores):  # overwritten, since they may be NaN
            scores[i, j] = np.float32(_MASKED)
        block_sum = exp_row(scores.ctypes.data + 4 * i * _KEY_BLOCK, num_scores, new_max)
        if new_max > old_max:
            shrink = np.float32(math.exp(old_max - new_max))
            scratch.row_sum[i] *= shrink
            for d in range(acc.shape[1]):
                acc[i, d] *= shrink
            scratch.row_max[i] = new_max
        scratch.row_sum[i] += block_sum


@njit(nogil=True, cache=True)
@no_type_check
def _accumulate_values(tile, pages, start, stop, scratch):
    """acc += weights @ values start .. stop - 1."""
    row_bytes, score_bytes = 4 * pages.head_dim, 4 * _KEY_BLOCK
    num_rows = (tile.end - tile.first) * tile.queries_per_token
    max_rows, num_panels = microkernel_rows(), microkernel_panels()
    # A panel of entries at a time: they lie in one page, so their values are evenly spaced.
    for entry in range(start, stop, PANEL):
        # Entries behind `stop` may never have been written: not even with weight 0 are they read.
        num_entries = min(PANEL, stop - entry)
        values = _value_address(pages, tile.kv_head, entry)
        # Prefetch in the order in which things are read: values of this block, keys of the next
        # one, keys of the next head.
        ahead = entry + _PREFETCH_DISTANCE
        if ahead < stop:
            prefetch = _value_address(pages, tile.kv_head, ahead)
        elif ahead < tile.max_context_len:
            prefetch = _key_address(pages, tile.kv_head, ahead)
        else:
            next_head = min(tile.kv_head + 1, pages.num_kv_heads - 1)
            ahead = min(ahead - tile.max_context_len, tile.max_context_len - 1)
            prefetch = _key_address(pages, next_head, ahead)
        # Columns of the product are the D numbers of a value, a step is one entry.
        for d in range(0, pages.head_dim, num_panels * PANEL):
            second = d + (num_panels - 1) * PANEL
            second = second if second < pages.head_dim else d  # the same panel again: an odd one
            panels = PanelPair(
                first=values + 4 * d,
                second=values + 4 * second,
                step_bytes=row_bytes,
                num_steps=num_entries,
                prefetch_first=prefetch + 4 * d,
                prefetch_second=prefetch + 4 * second,
                scales_first=0,
                scales_second=0,
            )
            for i in range(0, num_rows, max_rows):
                acc = scratch.acc.ctypes.data + row_bytes * i
                inputs = InputRows(
                    address=scratch.scores.ctypes.data + score_bytes * i + 4 * (entry - start),
                    row_bytes=score_bytes,
                    num_rows=min(max_rows, num_rows - i),
                    scales=0,
                )
                outputs = OutputBlock(
                    first=acc + 4 * d, second=acc + 4 * second, row_bytes=row_bytes, add=1
                )
                gemm_microkernel("float32", inputs, panels, outputs)


@njit(nogil=True, cache=True, fastmath=set(FASTMATH))
@no_type_check
def _attend_tile(attention, context_lens, tile, pages, scratch):
    """Attention of one tile of queries, for the query heads of one key-value head."""
    q, out, size, per_token = attention.q, attention.out, pages.head_dim, tile.queries_per_token
    num_rows = (tile.end - tile.first) * per_token
    scale = np.float32(1 / math.sqrt(size))
    # Gather the queries: row i is a token's i % per_token-th head among those of the kv head.
    for i in range(num_rows):
        token, head = tile.first + i // per_token, tile.kv_head * per_token + i % per_token
        for d in range(size):
            scratch.queries[i, d] = q[token, head * size + d] * scale
            scratch.acc[i, d] = 0
        scratch.row_max[i], scratch.row_sum[i] = np.float32(_MASKED), 0
    # All tokens of the tile walk to the last one's end; what an earlier one does not see is masked.
    for start in range(0, tile.max_context_len, _KEY_BLOCK):
        stop = min(tile.max_context_len, start + _KEY_BLOCK)
        num_scores = (stop - start + PANEL - 1) // PANEL * PANEL
        _scores(tile, pages, start, stop, scratch)
        _online_softmax(tile, context_lens, start, num_scores, scratch)
        _accumulate_values(tile, pages, start, stop, scratch)
    for i in range(num_rows):
        token, head = tile.first + i // per_token, tile.kv_head * per_token + i % per_token
        inverse = np.float32(1) / scratch.row_sum[i]
        for d in range(size):
            out[token, head * size + d] = scratch.acc[i, d] * inverse


@njit(nogil=True, cache=True)
@no_type_check
def index_tiles(query_start_loc):
    """The tiles of all sequences of a batch."""
    num_sequences, num_tiles = query_start_loc.shape[0] - 1, 0
    for u in range(num_sequences):
        num_tokens = query_start_loc[u + 1] - query_start_loc[u]
        num_tiles += (num_tokens + _TOKENS_PER_TILE - 1) // _TOKENS_PER_TILE
    sequences, first_tokens = np.empty(num_tiles, np.int64), np.empty(num_tiles, np.int64)
    tile = 0
    for u in range(num_sequences):
        for first in range(query_start_loc[u], query_start_loc[u + 1], _TOKENS_PER_TILE):
            sequences[tile], first_tokens[tile] = u, first
            tile += 1
    return TileIndex(sequences=sequences, first_tokens=first_tokens)


@njit(nogil=True, cache=True)
@no_type_check
def new_scratch(attention_width, v_cells):
    """A thread's `TileScratch` for the largest tile; attention_width is H * D.

    One allocation, cut up: what a thread uses lies together in its cache.
    """
    size = v_cells.shape[3]
    rows = _TOKENS_PER_TILE * (attention_width // size // v_cells.shape[1])
    memory = np.empty(rows * (2 * size + _KEY_BLOCK + 2), np.float32)
    queries, rest = memory[: rows * size], memory[rows * size :]
    acc, rest = rest[: rows * size], rest[rows * size :]
    scores, rest = rest[: rows * _KEY_BLOCK], rest[rows * _KEY_BLOCK :]
    return TileScratch(
        queries=queries.reshape(rows, size),
        scores=scores.reshape(rows, _KEY_BLOCK),
        acc=acc.reshape(rows, size),
        row_max=rest[:rows],
        row_sum=rest[rows:],
    )


@njit(nogil=True, cache=True)
@no_type_check
def _attend(queue, stage, attention, batch, tiles, scratch):
    """One thread's part of a stage whose tiles are those of `tiles`, with all key-value heads."""
    _, num_kv_heads, block_size, head_dim = attention.cells.v.shape
    num_tiles = tiles.sequences.shape[0]
    tile = next_tile(queue, stage)
    while tile < num_tiles:
        sequence, first = tiles.sequences[tile], tiles.first_tokens[tile]
        end = min(first + _TOKENS_PER_TILE, batch.query_start_loc[sequence + 1])
        pages = SequencePages(
            keys=attention.cells.k.ctypes.data,
            values=attention.cells.v.ctypes.data,
            page_table=batch.page_tables[sequence],
            layer=attention.layer,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
        )
        # One head after another: its scores are in the cache when its values are mixed.
        for kv_head in range(num_kv_heads):
            queries = QueryTile(
                first=first,
                end=end,
                kv_head=kv_head,
                queries_per_token=attention.q.shape[1] // head_dim // num_kv_heads,
                max_context_len=batch.context_lens[end - 1],
            )
            _attend_tile(attention, batch.context_lens, queries, pages, scratch)
        finish_tile(queue, stage)
        tile = next_tile(queue, stage)
    wait_for_tiles(queue, stage, num_tiles)
