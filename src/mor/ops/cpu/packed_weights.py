"""Weights laid out for the CPU kernels."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from mor.ops.cpu.cpu_features import has_int8_dot
from mor.ops.low_rank import LoRAPair

Storage = Literal["float32", "bfloat16", "int8"]

PANEL = 16
"""Columns that lie side by side; `micro.PANEL`."""
_LARGEST_INT32 = 2**31 - 1


class PackedLinear:
    """A linear layer's weight (N, K) in panels: (N / PANEL, K, PANEL), N filled up with zeros.

    int8: values in -127..127, one scale per output, some neighboring k side by side: 4 where the
    processor multiplies bytes, else 2. Inputs are then rounded to `levels` steps either way: to
    bytes, or to as many (12 bits) as keep an int32 sum from running over, since products with
    16-bit inputs cost no more than with 8-bit ones.
    """

    def __init__(self, weight: Float[Tensor, "n k"], storage: Storage) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight_dtype: Storage = storage
        full = pad(weight.detach().float(), (0, 0, 0, -self.out_features % PANEL))
        self.padded_features = full.shape[0]
        """Outputs with those that fill the last panel."""
        self.max_quantized_input = 0
        self.scales = torch.zeros(0)
        """int8: for each panel its (PANEL,) scales, and as int32 what its sums begin with."""
        if storage == "int8":
            scales, rounded = quantize(full)
            together = 4 if has_int8_dot() else 2
            start = torch.zeros_like(rounded[:, 0], dtype=torch.int32)
            if together == 4:
                self.max_quantized_input = 127
                start = -128 * rounded.sum(1, dtype=torch.int32)  # inputs come as 128 + x
            else:
                self.max_quantized_input = min(4095, _LARGEST_INT32 // (127 * self.in_features))
            halves = scales.view(-1, 1, PANEL), start.view(torch.float32).view(-1, 1, PANEL)
            self.scales = torch.cat(halves, 1).contiguous()
            steps = pad(rounded, (0, -self.in_features % together))
            panels = steps.view(-1, PANEL, steps.shape[1] // together, together)
            self.data = panels.transpose(1, 2).contiguous()
        else:
            panels = full.view(-1, PANEL, self.in_features).transpose(1, 2).contiguous()
            self.data = panels.bfloat16() if storage == "bfloat16" else panels


class PackedLoRA:
    """The deltas of one product for the CPU kernels, in fp32 whatever the product's weights are."""

    def __init__(self, deltas: Sequence[LoRAPair]) -> None:
        self.packed: list[PackedLinear] = []
        """A and B of each group in turns."""
        self.width = 0
        """Columns between A and B: the rank, filled up to whole panels."""
        for down, up in deltas:
            self.width = down.shape[0] + -down.shape[0] % PANEL
            filled = pad(up, (0, self.width - up.shape[1]))
            self.packed += [PackedLinear(down, "float32"), PackedLinear(filled, "float32")]


def quantize(weight: Float[Tensor, "n k"]) -> tuple[Float[Tensor, " n"], Int[Tensor, "n k"]]:
    """(N,) scales and int8 values, symmetric, one scale per output channel."""
    scales = weight.abs().amax(1) / 127
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    return scales, (weight / safe[:, None]).round().to(torch.int8)
