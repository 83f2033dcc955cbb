"""Weights laid out for the CPU kernels."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Storage = Literal["float32", "bfloat16", "int8"]

PANEL = 16
"""Columns that lie side by side; `micro.PANEL`."""
_LARGEST_INT32 = 2**31 - 1


class PackedLinear:
    """A linear layer's weight (N, K) in panels: (N / PANEL, K, PANEL), N filled up with zeros.

    int8: one scale per output, values in -127..127, two neighbouring k side by side. Inputs are
    then rounded to `levels` steps either way: as many (12 bits) as keep an int32 sum from running
    over, since the product with 16-bit inputs costs no more than with 8-bit ones.
    """

    def __init__(self, weight: Float[Tensor, "n k"], storage: Storage) -> None:
        self.out_features, self.in_features = weight.shape
        self.storage: Storage = storage
        missing = -self.out_features % PANEL
        full = torch.nn.functional.pad(weight.detach().float(), (0, 0, 0, missing))
        self.scales = torch.ones(full.shape[0])
        self.levels = 0
        if storage == "int8":
            self.scales, rounded = quantise(full)
            self.levels = min(4095, _LARGEST_INT32 // (127 * self.in_features))
            odd = self.in_features % 2
            panels = torch.nn.functional.pad(rounded, (0, odd)).view(-1, PANEL, full.shape[1] + odd)
            pairs = panels.view(panels.shape[0], PANEL, -1, 2)
            self.data = pairs.transpose(1, 2).contiguous()
        else:
            panels = full.view(-1, PANEL, self.in_features).transpose(1, 2).contiguous()
            self.data = panels.bfloat16() if storage == "bfloat16" else panels

    @property
    def padded_features(self) -> int:
        """Outputs with those that fill the last panel."""
        return self.scales.shape[0]


def quantise(weight: Float[Tensor, "n k"]) -> tuple[Float[Tensor, " n"], Int[Tensor, "n k"]]:
    """(N,) scales and int8 values, symmetric, one scale per output channel."""
    scales = weight.abs().amax(1) / 127
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    return scales, (weight / safe[:, None]).round().to(torch.int8)
