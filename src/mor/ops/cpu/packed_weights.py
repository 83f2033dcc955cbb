"""Weights laid out for the CPU kernels; `mor.ops.cpu` draws the layout."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from mor.ops.cpu.cpu_features import SIMD_WIDTH, has_int8_dot
from mor.ops.low_rank import LoRAPair

WeightDType = Literal["float32", "bfloat16", "int8"]
"""How a packed weight is stored."""
FLOAT32, BFLOAT16, INT8 = 0, 1, 2
"""The same for compiled code, which compares numbers: places in `WeightDType`."""

PANEL = SIMD_WIDTH
"""Columns (outputs) of one panel: one vector of the microkernel."""
_LARGEST_INT32 = 2**31 - 1


def dtype_code(weight_dtype: WeightDType) -> int:
    """FLOAT32, BFLOAT16 or INT8."""
    return get_args(WeightDType).index(weight_dtype)


class PackedLinear:
    """A linear layer's weight (N, K) in panels: (N / PANEL, K, PANEL), N filled up with zeros.

    int8: values in -127..127, one scale per output, some neighboring k side by side: 4 where the
    processor multiplies bytes, else 2. Inputs are then quantized to -max_quantized_input ..
    max_quantized_input: to bytes, or to as many (12 bits) as keep an int32 sum from running over,
    since products with 16-bit inputs cost no more than with 8-bit ones.
    """

    def __init__(self, weight: Float[Tensor, "n k"], weight_dtype: WeightDType) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight_dtype: WeightDType = weight_dtype
        full = pad(weight.detach().float(), (0, 0, 0, -self.out_features % PANEL))
        self.padded_features = full.shape[0]
        """Outputs with those that fill the last panel."""
        self.max_quantized_input = 0
        """int8: largest magnitude of a quantized input; otherwise 0."""
        self.scales = torch.zeros(0)
        """int8: (N / PANEL, 2, PANEL): a panel's scales, then as int32 what its sums begin with."""
        if weight_dtype == "int8":
            self._pack_int8(full)
        else:
            # (N / PANEL, PANEL, K) -> (N / PANEL, K, PANEL): a step's 16 columns side by side.
            panels = full.view(-1, PANEL, self.in_features).transpose(1, 2).contiguous()
            self.data = panels.bfloat16() if weight_dtype == "bfloat16" else panels

    def _pack_int8(self, full: Float[Tensor, "n k"]) -> None:
        """Set `data` (N / PANEL, steps, PANEL, k of a step), `scales` and `max_quantized_input`."""
        scales, quantized = quantize(full)
        k_per_step = 4 if has_int8_dot() else 2
        initial_sums = torch.zeros_like(quantized[:, 0], dtype=torch.int32)
        if k_per_step == 4:
            self.max_quantized_input = 127
            # vpdpbusd takes unsigned inputs, so x comes as x + 128: take 128 * sum(w) off again.
            initial_sums = -128 * quantized.sum(1, dtype=torch.int32)
        else:
            self.max_quantized_input = min(4095, _LARGEST_INT32 // (127 * self.in_features))
        # The bits of int32 sums travel in a float32 array beside the scales of the same panel.
        halves = scales.view(-1, 1, PANEL), initial_sums.view(torch.float32).view(-1, 1, PANEL)
        self.scales = torch.cat(halves, 1).contiguous()
        steps = pad(quantized, (0, -self.in_features % k_per_step))
        panels = steps.view(-1, PANEL, steps.shape[1] // k_per_step, k_per_step)
        self.data = panels.transpose(1, 2).contiguous()

    @property
    def pointers(self) -> tuple[int, int, int]:
        """Address of the panels, address of the scales, max_quantized_input: for compiled code.

        They are valid as long as this object lives.
        """
        return self.data.data_ptr(), self.scales.data_ptr(), self.max_quantized_input


class PackedLoRA:
    """LoRA pairs of one product for the CPU kernels, fp32 whatever the product's weights are."""

    def __init__(self, pairs: Sequence[LoRAPair]) -> None:
        self.packed: list[PackedLinear] = []
        """A and B of each depth in turns."""
        self.width = 0
        """Columns between A and B: the rank, filled up to whole panels."""
        for down, up in pairs:
            self.width = down.shape[0] + -down.shape[0] % PANEL
            # B reads the padded columns of x @ A.T, which are 0: its weights there are 0, too.
            filled = pad(up, (0, self.width - up.shape[1]))
            self.packed += [PackedLinear(down, "float32"), PackedLinear(filled, "float32")]


def quantize(weight: Float[Tensor, "n k"]) -> tuple[Float[Tensor, " n"], Int[Tensor, "n k"]]:
    """(N,) scales and int8 values, symmetric, one scale per output channel."""
    scales = weight.abs().amax(1) / 127
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))  # a row of zeros stays zeros
    return scales, (weight / safe[:, None]).round().to(torch.int8)
