"""The engine's operations as Triton kernels for NVIDIA GPUs; `reference` says what each means.

Work is handed out by shapes alone: nothing here waits for the device or reads a tensor on the host,
so that every function can be captured in a CUDA graph. Sums are taken in fp32, products of fp32
inputs in full fp32; q, cells and the rest may be fp32, bf16 or fp16. Cells and tables of angles are
contiguous. Without Triton the module can be imported; its functions raise MissingExtraError.

Shape letters as in `paged`; E is the width of a row, I that of a gate.
"""

from __future__ import annotations  # for signatures of kernels where there is no Triton

import math
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from mor.ops.paged import AttentionMetadata, PagedKV, RopeTable
from mor.ops.triton_launch import jit, launch, power_of_two

try:
    import triton.language as tl
    from triton.language import constexpr, tensor
except ImportError:
    pass

_MAX_ROWS = 64  # rows (tokens x query heads of one key-value head) of a program of `attend`
_TILE_BYTES = 16384  # keys that such a program holds at once
_SPLIT_ENTRIES = 128  # entries that are worth a program of their own


def _packed(x: Tensor) -> Tensor:
    """x, (N, heads, D), with each token's part in one piece; tokens may lie anywhere."""
    return x if not len(x) or x[0].is_contiguous() else x.contiguous()


@jit
@no_type_check
def _turned(x: tensor, cos: tensor, sin: tensor, inside: tensor, half: constexpr) -> Any:
    """The rotated first and second halves, fp32, of heads whose first halves x points to."""
    first = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + half, mask=inside, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@jit
@no_type_check
def _place(
    q: tensor, out: tensor, k: tensor, v: tensor, cos: tensor, sin: tensor, positions: tensor,
    k_cells: tensor, v_cells: tensor, slot_cells: tensor, slot_offsets: tensor, layer: tensor,
    num_writing: tensor, q_stride: tensor, k_stride: tensor, v_stride: tensor, turns: constexpr,
    heads: constexpr, kv_heads: constexpr, half: constexpr, size: constexpr,
    block_h: constexpr, block_g: constexpr, block_half: constexpr,
) -> None:  # fmt: skip
    """One program a token: turns its queries (if `heads`), turns and stores its keys and values."""
    token = tl.program_id(0).to(tl.int64)
    dim: constexpr = 2 * half
    d = tl.arange(0, block_half)[None]
    if turns:
        angle = tl.load(positions + token).to(tl.int64) * half + d
        c = tl.load(cos + angle, mask=d < half, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=d < half, other=0.0).to(tl.float32)
    if heads > 0:
        head = tl.arange(0, block_h)[:, None]
        inside = (head < heads) & (d < half)
        first, second = _turned(q + token * q_stride + head * dim + d, c, s, inside, half)
        there = out + (token * heads + head) * dim + d
        tl.store(there, first, mask=inside)
        tl.store(there + half, second, mask=inside)
    if token >= num_writing:
        return
    # The cell of the stack's first layer; negative where a graph's padding must store nothing.
    cell = tl.load(slot_cells + token).to(tl.int64)
    slot = tl.load(slot_offsets + token)
    g = tl.arange(0, block_g)[:, None]
    inside = (g < kv_heads) & (d < half) & (cell >= 0)
    key, value = k + token * k_stride + g * dim + d, v + token * v_stride + g * dim + d
    if turns:
        first, second = _turned(key, c, s, inside, half)
    else:
        first = tl.load(key, mask=inside, other=0.0)
        second = tl.load(key + half, mask=inside, other=0.0)
    start = ((cell + layer) * kv_heads + g) * (dim * size)
    # Keys are stored turned, (D, S): a query meets the S of them at once. Values are (S, D).
    there = k_cells + start + d * size + slot
    tl.store(there, first, mask=inside)
    tl.store(there + half * size, second, mask=inside)
    there = v_cells + start + slot * dim + d
    tl.store(there, tl.load(value, mask=inside, other=0.0), mask=inside)
    tl.store(there + half, tl.load(value + half, mask=inside, other=0.0), mask=inside)


@jit
@no_type_check
def _tile_tokens(
    program: tensor, runs: tensor, num_tokens: tensor, num_runs: tensor, tile: constexpr
) -> Any:  # fmt: skip
    """Run, first token and end of the tokens of a program; it has none where the end is not behind.

    Run u gets the programs from runs[u] // tile + u on. That is enough for its tiles wherever it
    starts, and makes N // tile + U in all. Where a tile is one token, program i has token i.
    Tokens behind the last run go to that run: they are padding, and shall get their zeros.
    """
    last = num_runs - 1
    spare: constexpr = 0 if tile == 1 else 1  # for a run's last tile, that may be a part of one
    # A guess that is right when every token is a run: it saves decode the search.
    guess = tl.minimum(program, last)
    above = tl.minimum(guess + 1, last)
    low = tl.where(tl.load(runs + guess) // tile + guess * spare <= program, guess, 0)
    high = tl.where(tl.load(runs + above) // tile + above * spare > program, guess, last)
    while low < high:
        middle = (low + high + 1) // 2
        begun = tl.load(runs + middle) // tile + middle * spare <= program
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
    first, end = program, program + 1
    if tile > 1:
        first = tl.load(runs + low)
        first += (program - (first // tile + low)) * tile
        end = tl.where(low == last, num_tokens, tl.load(runs + low + 1))
    return low, first, end


@jit
@no_type_check
def _scan(
    queries: tensor, k: tensor, v: tensor, table: tensor, layer: tensor, kv_head: tensor,
    seen: tensor, start: tensor, stop: tensor, scale: tensor, kv_heads: constexpr, dim: constexpr,
    size: constexpr, aligned: constexpr, block_m: constexpr, block_n: constexpr, block_d: constexpr,
) -> Any:  # fmt: skip
    """Online softmax over entries start .. stop: highest score, sum of weights, weighted sum."""
    d = tl.arange(0, block_d)
    peak = tl.full([block_m], -1e38, tl.float32)  # finite: the difference of infinities is NaN
    total = tl.zeros([block_m], tl.float32)
    mixed = tl.zeros([block_m, block_d], tl.float32)
    for begin in range(start, stop, block_n):
        entry = begin + tl.arange(0, block_n)
        # Keys are read whole, past `stop` too: a mask of any length would forbid wide loads.
        # There the last page stands in, so that every address is one of the pool.
        page = tl.minimum(entry, stop - 1) // size
        cell = (tl.load(table + page) + layer).to(tl.int64)
        start_of_head = cell * (kv_heads * dim * size) + kv_head * (dim * size)
        # Slots of a page lie side by side; behind a table the compiler cannot see that.
        slot = tl.max_contiguous(tl.multiple_of(start_of_head + entry % size, aligned), aligned)
        keys = tl.load(k + slot[None] + d[:, None] * size, mask=(d < dim)[:, None], other=0.0)
        there = (entry < stop)[:, None] & (d < dim)[None]  # an unused slot may hold a NaN
        at = start_of_head + (entry % size) * dim
        values = tl.load(v + at[:, None] + d[None], mask=there, other=0.0).to(queries.dtype)
        scores = tl.dot(queries, keys.to(queries.dtype), input_precision="ieee") * scale
        scores = tl.where(entry[None] < seen[:, None], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(weights, 1)
        weights = weights.to(queries.dtype)
        mixed = tl.dot(weights, values, mixed * shrink[:, None], input_precision="ieee")
        peak = higher
    return peak, total, mixed


@jit
@no_type_check
def _attend(
    q: tensor, k: tensor, v: tensor, out: tensor, sums: tensor, context_lens: tensor, runs: tensor,
    tables: tensor, scale: tensor, layer: tensor, num_tokens: tensor, num_runs: tensor,
    table_width: tensor, q_stride: tensor, heads: constexpr, kv_heads: constexpr, dim: constexpr,
    size: constexpr, aligned: constexpr, tile: constexpr, splits: constexpr,
    block_m: constexpr, block_n: constexpr, block_d: constexpr,
) -> None:  # fmt: skip
    """A program: up to `tile` tokens of one run, one key-value head, one part of the entries."""
    kv_head, split = tl.program_id(1), tl.program_id(2)
    run, first, end = _tile_tokens(tl.program_id(0), runs, num_tokens, num_runs, tile)
    if first >= end:
        return
    group: constexpr = heads // kv_heads
    # Row i of the tile: a token's i % group-th query head among those of the key-value head.
    row, d = tl.arange(0, block_m), tl.arange(0, block_d)
    token = (first + row // group).to(tl.int64)
    used = (row < tile * group) & (token < end)
    seen = tl.load(context_lens + token, mask=used, other=0)
    reach = tl.max(seen, 0)
    # Entries are split evenly, in whole blocks: late programs may get none, and store zeros.
    span = tl.cdiv(tl.cdiv(reach, splits), block_n) * block_n
    inside = used[:, None] & (d < dim)[None]
    head = kv_head * group + row % group
    queries = tl.load(
        q + (token * q_stride + head * dim)[:, None] + d[None], mask=inside, other=0.0
    )
    start, stop = split * span, tl.minimum(split * span + span, reach)
    table = tables + run * table_width
    peak, total, mixed = _scan(
        queries, k, v, table, layer, kv_head, seen, start, stop, scale,
        kv_heads, dim, size, aligned, block_m, block_n, block_d,
    )  # fmt: skip
    total = tl.where(total == 0, 1.0, total)  # nothing seen: zeros, and a peak without weight
    place = (split.to(tl.int64) * num_tokens + token) * heads + head
    tl.store(out + (place * dim)[:, None] + d[None], mixed / total[:, None], mask=inside)
    if splits > 1:
        tl.store(sums + place, peak + tl.log2(total), mask=used)


@jit
@no_type_check
def _merge(
    parts: tensor, sums: tensor, out: tensor, num_tokens: tensor,
    heads: constexpr, dim: constexpr, splits: constexpr, block_d: constexpr,
) -> None:  # fmt: skip
    """One program a token and head: the parts of its attention, weighted by their sums."""
    place = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    split, d = tl.arange(0, splits), tl.arange(0, block_d)
    at = split.to(tl.int64) * num_tokens * heads + place
    sums_here = tl.load(sums + at)
    # log2 of each part's sum of weights: a part without entries has -1e38, hence weight 0.
    weights = tl.exp2(sums_here - tl.max(sums_here, 0))
    values = tl.load(parts + (at * dim)[:, None] + d[None], mask=(d < dim)[None], other=0.0)
    mixed = tl.sum(values * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + place * dim + d, mixed, mask=d < dim)


@jit
@no_type_check
def _rms_norm(
    x: tensor, weight: tensor, out: tensor, eps: tensor, x_row: tensor,
    width: constexpr, block: constexpr,
) -> None:  # fmt: skip
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, block)
    values = tl.load(x + row * x_row + e, mask=e < width, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    weights = tl.load(weight + e, mask=e < width, other=0.0).to(tl.float32)
    tl.store(out + row * width + e, values * scale * weights, mask=e < width)


@jit
@no_type_check
def _silu_mul(
    x: tensor, out: tensor, x_row: tensor, width: constexpr, block: constexpr
) -> None:  # fmt: skip
    """One program a part of a row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * block + tl.arange(0, block)
    gate = tl.load(x + row * x_row + i, mask=i < width, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_row + width + i, mask=i < width, other=0.0).to(tl.float32)
    tl.store(out + row * width + i, gate * tl.sigmoid(gate) * up, mask=i < width)


def rotate(
    x: Float[Tensor, "n h d"], rotations: RopeTable, metadata: AttentionMetadata
) -> Float[Tensor, "n h d"]:
    """RoPE at each token's position, computed in fp32: `reference.rotate`."""
    (num, heads, dim), x, out = x.shape, _packed(x), x.new_empty(x.shape)
    launch(
        _place, (num,), x,
        x, out, x, x, rotations.cos, rotations.sin, metadata.positions,
        x, x, metadata.slot_cells, metadata.slot_offsets, 0, 0, x.stride(0), 0, 0, True,
        heads, 0, dim // 2, 1, power_of_two(heads), 1, power_of_two(dim // 2),
    )  # fmt: skip
    return out


def store(
    k: Float[Tensor, "w g d"],
    v: Float[Tensor, "w g d"],
    kv: PagedKV,
    layer: int,
    metadata: AttentionMetadata,
) -> None:
    """Put the writing tokens' rotated keys and values into their slots: `reference.store`.

    A token whose `slot_cells` is negative writes nothing, so a graph's padding can be among the W.
    """
    _write(k[:, :0], k, v, None, kv, layer, metadata)


def rotate_and_store(
    q: Float[Tensor, "n h d"], k: Float[Tensor, "w g d"], v: Float[Tensor, "w g d"],
    rotations: RopeTable, kv: PagedKV, layer: int, metadata: AttentionMetadata,
) -> Float[Tensor, "n h d"]:  # fmt: skip
    """`rotate` q and k, `store` k and v, in one kernel; returns q rotated."""
    return _write(q, k, v, rotations, kv, layer, metadata)


def _write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turn: RopeTable | None,
    kv: PagedKV,
    layer: int,
    metadata: AttentionMetadata,
) -> Tensor:
    """Both of them: (W, 0, D) queries and no rotations where only `store` is meant."""
    (num, heads, dim), (writing, kv_heads, _) = q.shape, k.shape
    assert kv.k.is_contiguous() and kv.v.is_contiguous()  # noqa: PT018
    q, k, v, out = _packed(q), _packed(k), _packed(v), q.new_empty(q.shape)
    cos, sin = (turn.cos, turn.sin) if turn is not None else (k, k)
    launch(
        _place, (num,), k,
        q, out, k, v, cos, sin, metadata.positions,
        kv.k, kv.v, metadata.slot_cells, metadata.slot_offsets,
        layer, writing, q.stride(0), k.stride(0), v.stride(0), turn is not None,
        heads, kv_heads, dim // 2, kv.k.shape[3],
        power_of_two(heads), power_of_two(kv_heads), power_of_two(dim // 2),
    )  # fmt: skip
    return out


def attend(
    q: Float[Tensor, "n h d"],
    kv: PagedKV,
    layer: int,
    metadata: AttentionMetadata,
    *,
    max_query_len: int | None = None,
    splits: int | None = None,
) -> Float[Tensor, "n h d"]:
    """Paged flash attention of every token to the first `context_lens` entries of its run's table.

    `reference.attend`, and more: a token that sees no entry gets zeros, a run may have no tokens,
    and tokens behind the last run are padding, whose context_lens must be 0.

    A program takes a tile of tokens of one run with all query heads of one key-value head, so that
    these share what is read; where programs are few, as in decode, several of them share the
    entries of a tile, and a second kernel merges what they found (flash decoding).

    Args:
        max_query_len: length of the longest run, 1 in pure decode. It sets the size of the tiles,
            so a wrong number costs time only. None takes the mean length.
        splits: programs that share the entries of a tile, a power of two. None chooses by the
            shapes N, U and P; with a given number and `max_query_len=1` a token's result has the
            same bits in whatever batch it is.
    """
    (num, heads, dim), (_, kv_heads, _, size) = q.shape, kv.k.shape
    num_runs, width = metadata.page_tables.shape
    if not num_runs:
        return torch.zeros_like(q)
    assert kv.k.is_contiguous() and kv.v.is_contiguous()  # noqa: PT018
    group, block_d = heads // kv_heads, max(power_of_two(dim), 16)
    max_length = max_query_len if max_query_len is not None else -(-num // num_runs)
    maximum = (
        _MAX_ROWS if q.element_size() < 4 else 16
    )  # fp32 is no work for tensor cores: it spills
    block_m = max(min(power_of_two(max_length * group), maximum), power_of_two(group), 16)
    tile = 1 if max_length <= 1 else block_m // group
    block_n = max(min(_TILE_BYTES // (block_d * q.element_size()), 64), 16)
    tiles = num if tile == 1 else num // tile + num_runs
    splits = splits or _num_splits(tiles * kv_heads, width * size, q.device)
    q, out = _packed(q), q.new_empty(q.shape)
    parts = sums = out
    if splits > 1:
        parts = q.new_empty((splits, *q.shape), dtype=torch.float32)
        sums = q.new_empty((splits, num, heads), dtype=torch.float32)
    # exp2 is faster than exp: scores are taken in powers of two.
    scale = dim**-0.5 * math.log2(math.e)
    launch(
        _attend, (tiles, kv_heads, splits), q,
        q, kv.k, kv.v, parts, sums,
        metadata.context_lens, metadata.query_start_loc, metadata.page_tables, scale, layer,
        num, num_runs, metadata.page_tables.stride(0), q.stride(0),
        heads, kv_heads, dim, size, min(size & -size, block_n), tile, splits,
        block_m, block_n, block_d, num_warps=8 if block_m * block_d > 4096 else 4,
    )  # fmt: skip
    if splits > 1:
        launch(_merge, (num, heads), q, parts, sums, out, num, heads, dim, splits, block_d)
    return out


def _num_splits(programs: int, entries: int, device: torch.device) -> int:
    """How many programs share a tile's entries: enough to fill the device, each with some work."""
    processors = 4  # for Triton's interpreter: no device
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = min(2 * processors // max(programs, 1), entries // _SPLIT_ENTRIES)
    return power_of_two(max(wanted, 1))


def rms_norm(
    x: Float[Tensor, "n e"], weight: Float[Tensor, " e"], eps: float
) -> Float[Tensor, "n e"]:
    """x / rms(x) * weight, computed in fp32: `reference.rms_norm`."""
    (num, width), out = x.shape, x.new_empty(x.shape)
    x = x if x.stride(1) == 1 else x.contiguous()
    launch(_rms_norm, (num,), x, x, weight, out, eps, x.stride(0), width, power_of_two(width))
    return out


def silu_mul(gate_up: Float[Tensor, "n two_i"]) -> Float[Tensor, "n i"]:
    """silu(gate) * up, the two halves of a row, computed in fp32: `reference.silu_mul`."""
    num, width = gate_up.shape[0], gate_up.shape[1] // 2
    x = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    block, out = min(power_of_two(width), 1024), x.new_empty((num, width))
    launch(_silu_mul, (num, -(-width // block)), x, x, out, x.stride(0), width, block)
    return out
