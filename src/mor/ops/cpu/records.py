"""What the engine hands to the compiled kernels: records of arrays, built without Numba.

Numba compiles a NamedTuple into its fields, so a record costs what its arrays cost. A parallel
function takes records of arrays and numbers only, not records of records.

Shape letters as in `mor.ops.paged`, and E width, I inner width, L layers of a stack, M rows,
V vocabulary. Integers are int64 where nothing else is said.
"""

from typing import NamedTuple

import numpy as np

from mor.ops.paged import AttentionMetadata, PagedKV, RopeTable

NUM_PRODUCTS = 5
"""Products of a layer, in this order: q, kv, o, gate_up, down."""
WEIGHT_FIELDS = 3
"""Numbers by which compiled code finds a weight: `PackedLinear.pointers`."""


class PackedWeight(NamedTuple):
    """Where a `PackedLinear` lies."""

    dtype: int
    """FLOAT32, BFLOAT16 or INT8."""
    data: int
    """Address of its panels."""
    scales: int
    """int8: address of each panel's scales and initial sums."""
    max_quantized_input: int


class Quantized(NamedTuple):
    """Rows of a product's inputs, quantized for int8 weights."""

    values: np.ndarray
    """(M, bytes) uint8: unsigned bytes that stand for -128..127, or int16."""
    scales: np.ndarray
    """(M,) float32."""


class LayerWeights(NamedTuple):
    """All weights of a stack, and how each layer uses the KV cache."""

    dtype: int
    """FLOAT32, BFLOAT16 or INT8: of the products' weights. LoRA pairs are float32."""
    pointers: np.ndarray
    """(L, NUM_PRODUCTS, WEIGHT_FIELDS) `PackedLinear.pointers`."""
    norms: np.ndarray
    """(L, 2, E) float32: before attention, before the MLP."""
    eps: float
    kv_layers: np.ndarray
    """(L,) which of a page's cells holds each layer's keys and values."""
    writes_kv: np.ndarray
    """(L,) 1: the layer stores its keys and values; 0: they are in the cache already."""
    lora_pointers: np.ndarray
    """(L, NUM_PRODUCTS, 2 * depths, WEIGHT_FIELDS): A and B of each depth in turns."""
    lora_widths: np.ndarray
    """(NUM_PRODUCTS,) columns of x @ A.T."""
    cos: np.ndarray
    """(T, D / 2) float32: RoPE's table."""
    sin: np.ndarray


class NormWeight(NamedTuple):
    """An RMSNorm."""

    weight: np.ndarray
    """(E,) float32."""
    eps: float


class KVCells(NamedTuple):
    """The pool of `PagedKV` as arrays."""

    k: np.ndarray
    """(C, G, D, S) float32."""
    v: np.ndarray
    """(C, G, S, D) float32."""

    @classmethod
    def of(cls, kv: PagedKV) -> "KVCells":
        """The same memory, not a copy."""
        return cls(k=kv.k.numpy(), v=kv.v.numpy())


class AttentionBatch(NamedTuple):
    """The fields of `AttentionMetadata` as int32 arrays, with the same meaning."""

    positions: np.ndarray
    context_lens: np.ndarray
    query_start_loc: np.ndarray
    page_tables: np.ndarray
    slot_cells: np.ndarray
    slot_offsets: np.ndarray
    depth_start_loc: np.ndarray
    """int64; empty where depths do not matter."""

    @classmethod
    def of(cls, metadata: AttentionMetadata) -> "AttentionBatch":
        """The same memory, apart from `depth_start_loc`."""
        return cls(
            positions=metadata.positions.numpy(),
            context_lens=metadata.context_lens.numpy(),
            query_start_loc=metadata.query_start_loc.numpy(),
            page_tables=metadata.page_tables.numpy(),
            slot_cells=metadata.slot_cells.numpy(),
            slot_offsets=metadata.slot_offsets.numpy(),
            depth_start_loc=np.array(metadata.depth_start_loc, np.int64),
        )


class CosSin(NamedTuple):
    """RoPE's table, (T, D / 2) float32."""

    cos: np.ndarray
    sin: np.ndarray

    @classmethod
    def of(cls, table: RopeTable) -> "CosSin":
        """The same memory, not a copy."""
        return cls(cos=table.cos.numpy(), sin=table.sin.numpy())


class QKV(NamedTuple):
    """What a layer's first two products give."""

    q: np.ndarray
    """(N, H * D) float32: queries of all tokens."""
    kv: np.ndarray
    """(W, 2 * G * D) float32: keys, then values, of the tokens that write them."""


class Workspace(NamedTuple):
    """Memory for what a layer computes, float32, of at least as many rows as the batch has."""

    normed: np.ndarray
    """(M, E): input of q and kv, later of gate_up."""
    q: np.ndarray
    """(M, H * D)."""
    kv: np.ndarray
    """(M, 2 * G * D)."""
    attn_out: np.ndarray
    """(M, H * D): input of o."""
    gate_up: np.ndarray
    """(M, 2 * I)."""
    inner: np.ndarray
    """(M, I): input of down."""
    quantized: np.ndarray
    """(M, bytes) uint8, see `Quantized`."""
    quantized_scales: np.ndarray
    """(M,)."""
    lora_out: np.ndarray
    """(M, widest of lora_widths): x @ A.T."""
    clock: np.ndarray
    """(3,) int64 cycles spent in products, in attention, in all else; the kernels add to it."""
