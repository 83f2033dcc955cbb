"""`RMSNorm`, of hidden states and, with `qk_norm`, of each query and key head."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mor.ops.memory_efficient import rms_norm


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), the mean over the last axis, taken in fp32.

    Zhang and Sennrich, arXiv 1910.07467. torch calls it `nn.RMSNorm`, transformers `LlamaRMSNorm`.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*n e"]) -> Float[Tensor, "*n e"]:
        """Normalize the last axis."""
        return rms_norm(x, self.weight, self.eps)
