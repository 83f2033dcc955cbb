"""Products of the CPU kernels: rows by packed weights, in fp32, bf16 or int8, and LoRA pairs.

Each function does one thread's part of a stage (see `work_queue`); the threads share a product by
columns: a tile is all rows of some panels. Letters: M rows, K inputs, N outputs with padding.
"""

from typing import NamedTuple, no_type_check

import numpy as np
from numba import njit

from mor.ops.cpu.cpu_features import FASTMATH, SIMD_WIDTH
from mor.ops.cpu.microkernel import (
    InputRows,
    OutputBlock,
    PanelPair,
    gemm_microkernel,
    int8_k_per_step,
    microkernel_panels,
    microkernel_rows,
)
from mor.ops.cpu.packed_weights import BFLOAT16, FLOAT32, INT8, PANEL
from mor.ops.cpu.records import PackedWeight
from mor.ops.cpu.simd_rows import abs_max_row, quantize_row
from mor.ops.cpu.work_queue import (
    finish_tile,
    next_tile,
    num_row_tiles,
    rows_of_tile,
    wait_for_tiles,
)

_INPUT_CACHE_BYTES = 256 * 1024  # of input rows that stay in a core's cache while weights pass
_STEPS_IN_L1 = 288  # of a panel that stay in a core's first cache: 18 KiB of fp32
_TILES_PER_THREAD = 2  # a slow thread then leaves half of its share to the others


class Gemm(NamedTuple):
    """out[:num_rows] = x[:num_rows] @ weight.T, or += if `add`."""

    x: np.ndarray
    """(M, K) float32."""
    num_rows: int
    out: np.ndarray
    """(M, N) float32."""
    add: int
    """0 or 1."""


class Layout(NamedTuple):
    """How the operands of a product lie in memory."""

    x: int
    """Address of the inputs: float32, or quantized."""
    x_bytes: int
    """From one row to the next."""
    out: int
    """Address of the results."""
    out_bytes: int
    """From one row to the next."""
    step_bytes: int
    """From one step of a panel to the next."""
    num_steps: int
    """Of a panel."""


class LoRA(NamedTuple):
    """The LoRA pairs of one product."""

    pointers: np.ndarray
    """(2 * depths, 3) `PackedLinear.pointers` of A and B in turns; 0 depths: there are none."""
    width: int
    """Columns of x @ A.T."""
    depth_start_loc: np.ndarray
    """Rows depth_start_loc[r] .. depth_start_loc[r + 1] take pair r."""
    lora_out: np.ndarray
    """Memory for x @ A.T."""


@njit(nogil=True, cache=True)
@no_type_check
def weight_at(dtype, pointers):
    """A `PackedWeight` of what `PackedLinear.pointers` gives."""
    return PackedWeight(
        dtype=dtype, data=pointers[0], scales=pointers[1], max_quantized_input=pointers[2]
    )


@njit(nogil=True, cache=True)
@no_type_check
def _layout(gemm, weight, quantized):
    """The `Layout` of a product's operands, by the kind of its weights."""
    x, x_bytes = gemm.x.ctypes.data, 4 * gemm.x.shape[1]
    k_per_step, step_bytes = 1, 4 * PANEL
    if weight.dtype == BFLOAT16:
        step_bytes = 2 * PANEL
    elif weight.dtype == INT8:
        x, x_bytes = quantized.values.ctypes.data, quantized.values.shape[1]
        k_per_step = int8_k_per_step()
        step_bytes = PANEL * k_per_step
    return Layout(
        x=x,
        x_bytes=x_bytes,
        out=gemm.out.ctypes.data,
        out_bytes=4 * gemm.out.shape[1],
        step_bytes=step_bytes,
        num_steps=(gemm.x.shape[1] + k_per_step - 1) // k_per_step,
    )


@njit(nogil=True, cache=True)
@no_type_check
def _multiply_panels(gemm, weight, quantized, first_panel, end_panel):
    """A tile: panels first_panel .. end_panel - 1 of a product, all rows.

    Weights stream by once, while as many input rows as fit stay in the cache.
    """
    x, x_bytes, out, out_bytes, step_bytes, num_steps = _layout(gemm, weight, quantized)
    panel_bytes = num_steps * step_bytes
    max_rows, num_panels = microkernel_rows(), microkernel_panels()
    cached_rows = max(1, _INPUT_CACHE_BYTES // x_bytes // max_rows) * max_rows
    # A panel that does not fit into the first cache passes all rows in parts of equal size. Only
    # where a panel goes alone: two at once need twice the cache. int8 sums cannot be split, since
    # the microkernel scales them.
    part_steps = num_steps
    if num_panels == 1 and weight.dtype != INT8:
        num_parts = (num_steps + _STEPS_IN_L1 - 1) // _STEPS_IN_L1
        part_steps = (num_steps + num_parts - 1) // num_parts
    for row_start in range(0, gemm.num_rows, cached_rows):
        num_rows = min(cached_rows, gemm.num_rows - row_start)
        # Register blocks of equal height: a last one of two rows would run slowly.
        num_blocks = (num_rows + max_rows - 1) // max_rows
        for panel in range(first_panel, end_panel, num_panels):
            second = min(panel + num_panels, end_panel) - 1  # the same panel again: an odd one
            for k0 in range(0, num_steps, part_steps):
                steps = min(part_steps, num_steps - k0)
                w = weight.data + k0 * step_bytes
                # Prefetch what is read next: the rest of a lone panel, or the next two panels.
                ahead = steps * step_bytes if num_panels == 1 else num_panels * panel_bytes
                panels = PanelPair(
                    first=w + panel * panel_bytes,
                    second=w + second * panel_bytes,
                    step_bytes=step_bytes,
                    num_steps=steps,
                    prefetch_first=w + panel * panel_bytes + ahead,
                    prefetch_second=w + second * panel_bytes + ahead,
                    scales_first=weight.scales + 8 * PANEL * panel,  # scales and initial sums
                    scales_second=weight.scales + 8 * PANEL * second,
                )
                for block in range(num_blocks):
                    i = row_start + block * num_rows // num_blocks
                    end = row_start + (block + 1) * num_rows // num_blocks
                    inputs = InputRows(
                        address=x + i * x_bytes + 4 * k0,  # a step takes 4 bytes of a row
                        row_bytes=x_bytes,
                        num_rows=end - i,
                        scales=quantized.scales.ctypes.data + 4 * i,
                    )
                    outputs = OutputBlock(
                        first=out + i * out_bytes + panel * 4 * PANEL,
                        second=out + i * out_bytes + second * 4 * PANEL,
                        row_bytes=out_bytes,
                        add=gemm.add if k0 == 0 else 1,  # later parts of a sum come on top
                    )
                    # The kind of weights is a constant in each call: three microkernels.
                    if weight.dtype == FLOAT32:
                        gemm_microkernel("float32", inputs, panels, outputs)
                    elif weight.dtype == BFLOAT16:
                        gemm_microkernel("bfloat16", inputs, panels, outputs)
                    else:
                        gemm_microkernel("int8", inputs, panels, outputs)


@njit(nogil=True, cache=True, fastmath=set(FASTMATH))
@no_type_check
def _quantize(queue, stage, gemm, max_quantized_input, quantized):
    """Rows of x as integers of at most `max_quantized_input` either way, and each row's scale.

    They are stored as the microkernel takes them: unsigned bytes with 128 for 0, or int16.
    """
    x, values = gemm.x, quantized.values
    k = x.shape[1]
    vector_k = k // SIMD_WIDTH * SIMD_WIDTH  # whole vectors; what is left goes one by one
    stored_bytes = 4 // int8_k_per_step()  # 1 or 2 of each number
    num_tiles = num_row_tiles(gemm.num_rows)
    tile = next_tile(queue, stage)
    while tile < num_tiles:
        for i in rows_of_tile(tile, gemm.num_rows):
            row, max_abs = x.ctypes.data + 4 * k * i, np.float32(0)
            if vector_k > 0:
                max_abs = abs_max_row(row, vector_k)
            for j in range(vector_k, k):
                max_abs = max(max_abs, abs(x[i, j]))
            scale = max_abs / np.float32(max_quantized_input)
            inverse = np.float32(1) / scale if scale > 0 else np.float32(0)  # a row of zeros
            if vector_k > 0:
                quantize_row(row, vector_k, inverse, values.ctypes.data + values.shape[1] * i)
            for j in range(vector_k, k + (-k & 3)):  # a step's missing k meet weights of 0
                value = np.int64(np.rint(x[i, j] * inverse)) if j < k else 0
                if stored_bytes == 1:
                    values[i, j] = value + 128
                else:  # int16, the lower byte first
                    values[i, 2 * j], values[i, 2 * j + 1] = value & 255, (value >> 8) & 255
            quantized.scales[i] = scale
        finish_tile(queue, stage)
        tile = next_tile(queue, stage)
    wait_for_tiles(queue, stage, num_tiles)


@njit(nogil=True, cache=True)
@no_type_check
def _linear(queue, stage, gemm, weight, quantized):
    """One stage: the product; int8 weights meet `quantized` instead of x."""
    num_panels = gemm.out.shape[1] // PANEL
    # Panels go in pairs where the microkernel takes two; a tile is some neighboring pairs.
    per_call = microkernel_panels()
    num_pairs = (num_panels + per_call - 1) // per_call
    num_tiles = min(num_pairs, _TILES_PER_THREAD * queue.num_threads)
    tile = next_tile(queue, stage)
    while tile < num_tiles:
        # Larger tiles first: threads that claim in turns then have the same in the end.
        first = tile * (num_pairs // num_tiles) + min(tile, num_pairs % num_tiles)
        end = first + num_pairs // num_tiles + (tile < num_pairs % num_tiles)
        first, end = first * per_call, min(end * per_call, num_panels)
        _multiply_panels(gemm, weight, quantized, first, end)
        finish_tile(queue, stage)
        tile = next_tile(queue, stage)
    wait_for_tiles(queue, stage, num_tiles)


@njit(nogil=True, cache=True)
@no_type_check
def _quantize_and_linear(queue, stage, gemm, weight, quantized):
    """Two stages: inputs quantized if the weights are int8, and the product."""
    if weight.dtype == INT8:
        _quantize(queue, stage, gemm, weight.max_quantized_input, quantized)
    _linear(queue, stage + 1, gemm, weight, quantized)


@njit(nogil=True, cache=True)
@no_type_check
def _add_lora(queue, stage, gemm, lora, quantized):
    """out[:num_rows] += x[:num_rows] @ A.T @ B.T, another pair for each depth; two stages a depth.

    `gemm.add` does not count, and `quantized` is not read, as A and B are float32.
    """
    for r in range(lora.pointers.shape[0] // 2):
        first = min(lora.depth_start_loc[r], gemm.num_rows)
        end = min(lora.depth_start_loc[r + 1], gemm.num_rows)
        n = end - first
        if n == 0:  # no token at this depth: its two stages stay unused
            continue
        x, out = gemm.x[first:end], gemm.out[first:end]
        a = weight_at(FLOAT32, lora.pointers[2 * r])
        b = weight_at(FLOAT32, lora.pointers[2 * r + 1])
        # x @ A.T is as narrow as the rank: it uses only the front part of its memory.
        lora_out = lora.lora_out.reshape(-1)[: n * lora.width].reshape(n, lora.width)
        down = Gemm(x=x, num_rows=n, out=lora_out, add=0)
        up = Gemm(x=lora_out, num_rows=n, out=out, add=1)
        _linear(queue, stage + 2 * r, down, a, quantized)
        _linear(queue, stage + 2 * r + 1, up, b, quantized)
