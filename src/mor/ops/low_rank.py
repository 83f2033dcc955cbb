"""Low-rank deltas of linear layers: y = W x + B A x, with another A and B at each depth.

A layer that runs at several depths has one matrix W for all of them and a thin pair for each (Bae
et al., "Relaxed Recursive Transformers", arXiv 2410.20672). Shape letters: N rows, K inputs,
M outputs, R rank.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class LoRAPair(NamedTuple):
    """A thin pair of matrices."""

    down: Float[Tensor, "r k"]
    """A."""
    up: Float[Tensor, "m r"]
    """B."""

    @classmethod
    def fused(cls, parts: Sequence["LoRAPair"], dtype: torch.dtype) -> "LoRAPair":
        """The delta of several layers with the same inputs, their outputs one after another."""
        down = torch.cat([part.down.detach() for part in parts])
        return cls(down.to(dtype), torch.block_diag(*(p.up.detach() for p in parts)).to(dtype))

    @classmethod
    def truncated(cls, lost: Float[Tensor, "m k"], rank: int) -> "LoRAPair":
        """The pair of this rank whose product is nearest to a matrix: B = U S, A = V^T."""
        u, s, v = torch.linalg.svd(lost, full_matrices=False)
        return cls(v[:rank], u[:, :rank] * s[:rank])


def add_loras(
    deltas: Sequence[LoRAPair],
    groups: Sequence[int],
    x: Float[Tensor, "n k"],
    out: Float[Tensor, "w m"],
) -> Float[Tensor, "w m"]:
    """`out`, a product of the first W rows of `x`, with each group's delta added in place.

    Args:
        deltas: of the groups; none: nothing is added.
        groups: rows groups[g] .. groups[g + 1] have deltas[g].
    """
    for delta, (first, end) in zip(deltas, pairwise(groups), strict=False):
        last = min(end, out.shape[0])
        if first < last:
            out[first:last] += F.linear(F.linear(x[first:last], delta.down), delta.up)
    return out
