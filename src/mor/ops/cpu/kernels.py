"""What the engine calls on CPUs, compiled by Numba: fp32 arithmetic; fp32, bf16, int8 weights.

One call runs a whole stack of layers on some threads (see `work_queue`), so that Python is left
once per engine step and not once per product. Each operation follows its namesake in `reference`;
tests hold them equal. Functions that begin with an underscore do one thread's part of a stage.

Shape letters as in `mor.ops.paged`, and M rows, K inputs, E width, I inner width, L layers.
"""

from pathlib import Path
from typing import NamedTuple, no_type_check

import numpy as np
from numba import njit, prange, set_num_threads

from mor.ops.cpu.attention import (
    Attention,
    TileIndex,
    TileScratch,
    _attend,
    index_tiles,
    new_scratch,
)
from mor.ops.cpu.code_cache import drop_stale_code
from mor.ops.cpu.cpu_features import SIMD_WIDTH
from mor.ops.cpu.elementwise import _rms_norm, _rotate_and_store, _silu_mul
from mor.ops.cpu.gemm import Gemm, LoRA, _add_lora, _linear, _quantize_and_linear, weight_at
from mor.ops.cpu.microkernel import cycles
from mor.ops.cpu.records import (
    NUM_PRODUCTS,
    QKV,
    AttentionBatch,
    CosSin,
    KVCells,
    LayerWeights,
    Quantized,
    Workspace,
)
from mor.ops.cpu.simd_rows import exp_sum_row, max_row, sum_row
from mor.ops.cpu.work_queue import (
    WorkQueue,
    finish_tile,
    new_counters,
    next_tile,
    wait_for_tiles,
)

_Q, _KV, _O, _GATE_UP, _DOWN = range(NUM_PRODUCTS)
# Stages of a layer, in order: norm, q (2), kv, rotate, attend, o (2), norm, gate_up (2), silu,
# down (2). A product has two, quantize and multiply; kv has one, since its inputs are those of q.
_FIRST_STAGES = (1, 3, 6, 9, 12)  # of each product
_NORM_1_STAGE, _ROTATE_STAGE, _ATTEND_STAGE, _NORM_2_STAGE, _SILU_STAGE = 0, 4, 5, 8, 11
_STAGES_PER_LAYER = 14


class StackRun(NamedTuple):
    """One pass of a batch through a stack, as one thread sees it."""

    x: np.ndarray
    """(N, E) states, changed in place."""
    layers: LayerWeights
    cells: KVCells
    batch: AttentionBatch
    workspace: Workspace
    tiles: TileIndex
    scratch: TileScratch


class Cycles(NamedTuple):
    """Time spent, by `microkernel.cycles`."""

    products: int
    attention: int


def use_threads(wanted: int) -> int:
    """How many threads the kernels use from now on: `wanted`, or all Numba was started with.

    To be called before any kernel: it also drops machine code of other sources from the cache.
    """
    from numba import config

    cache = Path(getattr(run_layers, "stats").cache_path)  # noqa: B009 - of Numba's dispatcher
    drop_stale_code(cache, Path(__file__).parent.glob("*.py"))
    threads = min(wanted, int(getattr(config, "NUMBA_NUM_THREADS")))  # noqa: B009
    set_num_threads(threads)
    return threads


@njit(nogil=True, cache=True)
@no_type_check
def _lora_stage(run, layer, product):
    """First stage of a product's LoRA pairs: they come after the stages of all layers."""
    num_layers, _, num_matrices, _ = run.layers.lora_pointers.shape  # A and B: a stage each
    return _STAGES_PER_LAYER * num_layers + (NUM_PRODUCTS * layer + product) * num_matrices


@njit(nogil=True, cache=True)
@no_type_check
def _project(queue, run, layer, product, gemm):
    """One of a layer's products, and its LoRA pairs on top."""
    layers, workspace = run.layers, run.workspace
    stage = _STAGES_PER_LAYER * layer + _FIRST_STAGES[product]
    weight = weight_at(layers.dtype, layers.pointers[layer, product])
    quantized = Quantized(values=workspace.quantized, scales=workspace.quantized_scales)
    if product == _KV:  # q has the same inputs, and comes before: they are quantized already
        _linear(queue, stage, gemm, weight, quantized)
    else:
        _quantize_and_linear(queue, stage, gemm, weight, quantized)
    lora = LoRA(
        pointers=layers.lora_pointers[layer, product],
        width=layers.lora_widths[product],
        depth_start_loc=run.batch.depth_start_loc,
        lora_out=workspace.lora_out,
    )
    _add_lora(queue, _lora_stage(run, layer, product), gemm, lora, quantized)


@njit(nogil=True, cache=True)
@no_type_check
def _attention_sublayer(queue, run, layer):
    """x += attention(norm(x)); returns the `Cycles` of its parts."""
    x, layers, batch, workspace = run.x, run.layers, run.batch, run.workspace
    n, kv_layer = x.shape[0], layers.kv_layers[layer]
    num_writing = batch.slot_cells.shape[0] * layers.writes_kv[layer]  # 0: all is in the cache
    stage = _STAGES_PER_LAYER * layer
    norm = layers.norms[layer, 0]
    _rms_norm(queue, stage + _NORM_1_STAGE, x, norm, layers.eps, workspace.normed)
    start = cycles()
    q = Gemm(x=workspace.normed, num_rows=n, out=workspace.q, add=0)
    _project(queue, run, layer, _Q, q)
    if num_writing > 0:
        kv = Gemm(x=workspace.normed, num_rows=num_writing, out=workspace.kv, add=0)
        _project(queue, run, layer, _KV, kv)
    projected = cycles()
    # Stored before anybody attends: a token sees its own entry and those of its batch before it.
    qkv = QKV(q=workspace.q[:n], kv=workspace.kv[:num_writing])
    cos_sin = CosSin(cos=layers.cos, sin=layers.sin)
    layer_cells = (run.cells, kv_layer)
    _rotate_and_store(queue, stage + _ROTATE_STAGE, qkv, layer_cells, batch, cos_sin)
    stored = cycles()
    attention = Attention(q=qkv.q, cells=run.cells, layer=kv_layer, out=workspace.attn_out)
    _attend(queue, stage + _ATTEND_STAGE, attention, batch, run.tiles, run.scratch)
    attended = cycles()
    o = Gemm(x=workspace.attn_out, num_rows=n, out=x, add=1)
    _project(queue, run, layer, _O, o)
    products = projected - start + cycles() - attended
    return Cycles(products=products, attention=attended - stored)


@njit(nogil=True, cache=True)
@no_type_check
def _mlp_sublayer(queue, run, layer):
    """x += down(silu(gate(norm(x))) * up(norm(x))); returns the cycles spent in products."""
    x, layers, workspace = run.x, run.layers, run.workspace
    n, stage = x.shape[0], _STAGES_PER_LAYER * layer
    norm = layers.norms[layer, 1]
    _rms_norm(queue, stage + _NORM_2_STAGE, x, norm, layers.eps, workspace.normed)
    start = cycles()
    gate_up = Gemm(x=workspace.normed, num_rows=n, out=workspace.gate_up, add=0)
    _project(queue, run, layer, _GATE_UP, gate_up)
    projected = cycles()
    _silu_mul(queue, stage + _SILU_STAGE, workspace.gate_up, n, workspace.inner)
    activated = cycles()
    down = Gemm(x=workspace.inner, num_rows=n, out=x, add=1)
    _project(queue, run, layer, _DOWN, down)
    return projected - start + cycles() - activated


@njit(nogil=True, cache=True)
@no_type_check
def _run_layers(queue, thread, run):
    """One thread's part of `run_layers`; thread 0 keeps the clock."""
    products, attention = 0, 0
    start = cycles()
    for layer in range(run.layers.pointers.shape[0]):
        spent = _attention_sublayer(queue, run, layer)
        products += spent.products + _mlp_sublayer(queue, run, layer)
        attention += spent.attention
    if thread == 0:
        clock = run.workspace.clock
        clock[0] += products
        clock[1] += attention
        clock[2] += cycles() - start - products - attention


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def run_layers(num_threads, x, layers, cells, batch, workspace):
    """All layers of a stack on x (N, E), in place.

    Args:
        layers: `LayerWeights`.
        cells: `KVCells`: tokens' keys and values are read there, and stored where layers write.
        batch: `AttentionBatch`.
        workspace: `Workspace` for N rows.
    """
    num_layers, num_products, num_matrices, _ = layers.lora_pointers.shape
    num_stages = (_STAGES_PER_LAYER + num_products * num_matrices) * num_layers
    queue = WorkQueue(counters=new_counters(num_stages), num_threads=num_threads)
    for thread in prange(num_threads):
        run = StackRun(
            x=x,
            layers=layers,
            cells=cells,
            batch=batch,
            workspace=workspace,
            tiles=index_tiles(batch.query_start_loc),
            scratch=new_scratch(workspace.q.shape[1], cells.v),
        )
        _run_layers(queue, np.int64(thread), run)


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def norm_and_head(num_threads, x, norm, head, workspace, logits):
    """logits = rms_norm(x) @ head, of N rows.

    Args:
        x: (N, E).
        norm: `NormWeight`.
        head: `PackedWeight`.
        workspace: `Workspace` for N rows.
        logits: (N, V filled up to whole panels).
    """
    queue = WorkQueue(counters=new_counters(3), num_threads=num_threads)
    for _ in prange(num_threads):
        quantized = Quantized(values=workspace.quantized, scales=workspace.quantized_scales)
        _rms_norm(queue, 0, x, norm.weight, norm.eps, workspace.normed)
        gemm = Gemm(x=workspace.normed, num_rows=x.shape[0], out=logits, add=0)
        _quantize_and_linear(queue, 1, gemm, head, quantized)


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def greedy(num_threads, logits, vocabulary, tokens, logprobs):
    """The likeliest token of each row (the first of equals), and its log-probability.

    Args:
        logits: (N, V filled up); columns from `vocabulary` on do not count.
        tokens, logprobs: (N,), written.
    """
    queue = WorkQueue(counters=new_counters(1), num_threads=num_threads)
    num_rows = logits.shape[0]
    in_vectors = vocabulary // SIMD_WIDTH * SIMD_WIDTH  # the others go one by one
    for _ in prange(num_threads):
        i = next_tile(queue, 0)  # a tile is a row
        while i < num_rows:
            row = logits.ctypes.data + 4 * logits.shape[1] * i
            largest = logits[i, 0]
            if in_vectors > 0:
                largest = max_row(row, in_vectors)
            for j in range(in_vectors, vocabulary):
                largest = max(largest, logits[i, j])
            total = np.float32(0)
            if in_vectors > 0:
                total = exp_sum_row(row, in_vectors, largest)
            for j in range(in_vectors, vocabulary):
                total += np.exp(logits[i, j] - largest)
            best = 0  # the last column if none equals the largest: there is a NaN
            while best < vocabulary - 1 and logits[i, best] != largest:
                best += 1
            # log softmax of the largest logit: log(exp(0) / total).
            tokens[i], logprobs[i] = best, -np.log(total)
            finish_tile(queue, 0)
            i = next_tile(queue, 0)
        wait_for_tiles(queue, 0, num_rows)


# -- single operations, for tests and benchmarks ---------------------------------------------------


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def linear(num_threads, x, weight, out, add, quantized):
    """out = x @ weight.T, or += if `add`, for all rows of x; out may have more.

    Args:
        weight: `PackedWeight`.
        quantized: `Quantized`, memory for N rows.
    """
    queue = WorkQueue(counters=new_counters(2), num_threads=num_threads)
    for _ in prange(num_threads):
        gemm = Gemm(x=x, num_rows=x.shape[0], out=out, add=add)
        _quantize_and_linear(queue, 0, gemm, weight, quantized)


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def rms_norm(num_threads, x, weight, eps, out):
    """out = x / rms(x) * weight, for all rows of x; out may have more."""
    queue = WorkQueue(counters=new_counters(1), num_threads=num_threads)
    for _ in prange(num_threads):
        _rms_norm(queue, 0, x, weight, eps, out)


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def silu_mul(num_threads, gate_up, out):
    """out = silu(gate) * up, the two halves of a row, for all rows of gate_up."""
    queue = WorkQueue(counters=new_counters(1), num_threads=num_threads)
    for _ in prange(num_threads):
        _silu_mul(queue, 0, gate_up, gate_up.shape[0], out)


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def rotate_and_store(num_threads, qkv, cells, layer, batch, cos_sin):
    """Rotate all queries in place; rotate and store keys, store values, of the tokens that write.

    Args:
        qkv: `QKV`.
        cells, layer: `KVCells`, and which of a page's cells is meant.
        batch: `AttentionBatch`.
        cos_sin: `CosSin`.
    """
    queue = WorkQueue(counters=new_counters(1), num_threads=num_threads)
    for _ in prange(num_threads):
        _rotate_and_store(queue, 0, qkv, (cells, layer), batch, cos_sin)


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def attend(num_threads, q, cells, layer, batch, out):
    """Attention of every token to the first `context_lens` entries of its sequence's pages.

    Args:
        q, out: (N, H * D).
        cells, layer: `KVCells`, and which of a page's cells is meant.
        batch: `AttentionBatch`.
    """
    queue = WorkQueue(counters=new_counters(1), num_threads=num_threads)
    for _ in prange(num_threads):
        attention = Attention(q=q, cells=cells, layer=layer, out=out)
        tiles, scratch = index_tiles(batch.query_start_loc), new_scratch(q.shape[1], cells.v)
        _attend(queue, 0, attention, batch, tiles, scratch)


@njit(nogil=True, cache=True)
@no_type_check
def read_cycles():
    """The clock that `run_layers` reads."""
    return cycles()


@njit(parallel=True, nogil=True, cache=True)
@no_type_check
def read_all(num_threads, x):
    """Sum of a float32 array, read once, on all threads: how fast memory can be read."""
    sums = np.zeros(num_threads, np.float32)
    per_thread = x.shape[0] // SIMD_WIDTH // num_threads * SIMD_WIDTH
    for t in prange(num_threads):
        sums[t] = sum_row(x.ctypes.data + 4 * t * per_thread, per_thread)
    return sums.sum()
