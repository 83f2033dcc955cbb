"""The kernels alone: matrix products by number of rows, paged attention by bandwidth."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F

from mor.bench.timing import paired
from mor.model.config import MoRConfig
from mor.ops.cpu import kernels as cpu
from mor.ops.cpu.packed_weights import PackedLinear, WeightDType, dtype_code
from mor.ops.cpu.records import AttentionBatch, KVCells, PackedWeight, Quantized
from mor.ops.paged import AttentionMetadata

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def seconds(task: Callable[[], object], repeats: int = 7) -> float:
    """Median of several runs, after one that does not count."""
    task()
    taken: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        task()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def products(config: MoRConfig, threads: int, layers: int = 10) -> dict[str, Any]:
    """GFLOP/s of the linear layers of some Transformer layers, by implementation and rows.

    Each pass touches all layers' weights, as a decode step does: they come from memory.
    """
    width, inner = config.hidden_size, config.intermediate_size
    heads, groups, size = config.num_heads_and_dim
    shapes = [(heads * size, width), (2 * groups * size, width), (width, heads * size)]
    shapes += [(2 * inner, width), (width, inner)]
    weights = [[torch.randn(shape) for shape in shapes] for _ in range(layers)]
    result: dict[str, Any] = {"rows": list(_ROWS)}
    flops = [2 * rows * layers * sum(a * b for a, b in shapes) for rows in _ROWS]

    def rates(name: str, task: Callable[[int], Callable[[], object]]) -> None:
        timed = [seconds(task(rows)) for rows in _ROWS]
        result[name] = [f / s / 1e9 for f, s in zip(flops, timed, strict=True)]

    weight_dtypes: tuple[WeightDType, ...] = get_args(WeightDType)
    for weight_dtype in weight_dtypes:
        packed = [[PackedLinear(w, weight_dtype) for w in ws] for ws in weights]
        rates(f"mor_{weight_dtype}", partial(_ours, packed, threads))
    rates("torch_linear_float32", lambda rows: _torch(weights, rows))
    if torch.backends.mkldnn.is_available():
        rates("onednn_packed_float32", lambda rows: _onednn(weights, rows))
    return result


def _ours(packed: list[list[PackedLinear]], threads: int, rows: int) -> Callable[[], object]:
    widest = max(w.in_features for w in packed[0])
    inputs = [np.random.randn(rows, w.in_features).astype(np.float32) for w in packed[0]]
    outputs = [np.zeros((rows, w.padded_features), np.float32) for w in packed[0]]
    quantized = Quantized(
        values=np.zeros((rows, 2 * widest), np.uint8),  # of each number a byte or an int16
        scales=np.zeros(rows, np.float32),
    )

    def task() -> None:
        for weights in packed:
            for weight, x, out in zip(weights, inputs, outputs, strict=True):
                found = PackedWeight(dtype_code(weight.weight_dtype), *weight.pointers)
                cpu.linear(threads, x, found, out, 0, quantized)

    return task


def _torch(weights: list[list[torch.Tensor]], rows: int) -> Callable[[], object]:
    inputs = [torch.randn(rows, w.shape[1]) for w in weights[0]]
    return lambda: [F.linear(x, w) for ws in weights for x, w in zip(inputs, ws, strict=True)]


def _onednn(weights: list[list[torch.Tensor]], rows: int) -> Callable[[], object]:
    ops = torch.ops.mkldnn
    packed = [[ops._reorder_linear_weight(w, rows) for w in ws] for ws in weights]
    inputs = [torch.randn(rows, w.shape[1]) for w in weights[0]]

    def task() -> None:
        for ws in packed:
            for x, w in zip(inputs, ws, strict=True):
                ops._linear_pointwise(x, w, None, "none", [], "")

    return task


def attention(
    config: MoRConfig, threads: int, sequences: int = 32, context: int = 1024, block_size: int = 16
) -> dict[str, Any]:
    """Paged decode attention against the rate at which the same bytes can be read at all."""
    heads, groups, size = config.num_heads_and_dim
    blocks = -(-context // block_size)
    rng = np.random.default_rng(0)
    layers = 8  # different memory for each call, so that nothing is in a cache
    shape = (sequences * blocks * layers, groups)
    keys = rng.standard_normal((*shape, size, block_size), np.float32)
    values = rng.standard_normal((*shape, block_size, size), np.float32)
    order = rng.permutation(sequences * blocks).reshape(sequences, blocks) * layers
    tables = order.astype(np.int32)
    none = torch.zeros(0, dtype=torch.int32)  # a decode step that stores nothing
    metadata = AttentionMetadata(
        positions=torch.full((sequences,), context - 1, dtype=torch.int32),
        context_lens=torch.full((sequences,), context, dtype=torch.int32),
        query_start_loc=torch.arange(sequences + 1, dtype=torch.int32),
        page_tables=torch.from_numpy(tables),
        slot_cells=none,
        slot_offsets=none,
    )
    cells, batch = KVCells(k=keys, v=values), AttentionBatch.of(metadata)
    q = rng.standard_normal((sequences, heads * size), np.float32)
    out = np.zeros_like(q)

    def ours() -> None:
        for layer in range(layers):
            cpu.attend(threads, q, cells, layer, batch, out)

    both = keys.reshape(-1), values.reshape(-1)
    times = paired(ours, lambda: [cpu.read_all(threads, part) for part in both], rounds=9)
    mine, read = (statistics.median(side) for side in (times.a, times.b))
    moved = keys.nbytes + values.nbytes
    return {
        "sequences": sequences,
        "context": context,
        "heads": [heads, groups, size],
        "ms": 1e3 * mine / layers,
        "gb_per_s": moved / mine / 1e9,
        "read_gb_per_s": moved / read / 1e9,
        "share_of_bandwidth": 1 / times.ratio,
        "gather_and_sdpa_ms": 1e3 * _gathered(q, keys, values, tables, config),
    }


def _gathered(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, tables: np.ndarray, config: MoRConfig
) -> float:
    """Seconds of the same by gathering pages and torch's attention."""
    heads, _, size = config.num_heads_and_dim
    cells, k, v = torch.from_numpy(tables).long(), torch.from_numpy(keys), torch.from_numpy(values)
    query = torch.from_numpy(q).view(len(tables), heads, 1, size)

    def task() -> torch.Tensor:
        gathered_k = k[cells].permute(0, 2, 1, 4, 3).flatten(2, 3)
        gathered_v = v[cells].permute(0, 2, 1, 3, 4).flatten(2, 3)
        return F.scaled_dot_product_attention(query, gathered_k, gathered_v, enable_gqa=True)

    return seconds(task, 3)


def measure(preset: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Products and attention of a preset's shapes."""
    config = MoRConfig.preset(preset)
    threads = cpu.use_threads(torch.get_num_threads())
    progress("matrix products")
    result = {"threads": threads, "products_gflops": products(config, threads)}
    progress("paged attention")
    shapes = (("paper_360m", MoRConfig.preset("360m")), (preset, config))
    result["attention"] = {name: attention(each, threads) for name, each in shapes}
    return result
