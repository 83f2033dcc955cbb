"""LoRA pairs of linear layers: y = W x + B A x, with another A and B at each depth.

A layer that runs at several depths has one matrix W for all of them and a pair of low rank for each
(Bae et al., "Relaxed Recursive Transformers", arXiv 2410.20672).

Shape letters: N rows, K inputs, M outputs, R rank, W rows that have an output.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class LoRAPair(NamedTuple):
    """Two matrices of low rank R whose product B A is added to a weight (Hu et al., 2021)."""

    down: Float[Tensor, "r k"]
    """A."""
    up: Float[Tensor, "m r"]
    """B."""

    @classmethod
    def fused(cls, parts: Sequence["LoRAPair"], dtype: torch.dtype) -> "LoRAPair":
        """One pair for several layers with the same inputs, their outputs one after another.

        Its rank is the sum of theirs.
        """
        down = torch.cat([part.down.detach() for part in parts])
        # Each part's outputs read only its own rows of A: B is block-diagonal.
        return cls(down.to(dtype), torch.block_diag(*(p.up.detach() for p in parts)).to(dtype))

    @classmethod
    def truncated(cls, lost: Float[Tensor, "m k"], rank: int) -> "LoRAPair":
        """The pair of this rank whose product is nearest to a matrix: B = U S, A = V^T."""
        u, s, v = torch.linalg.svd(lost, full_matrices=False)
        return cls(v[:rank], u[:, :rank] * s[:rank])


def add_loras(
    pairs: Sequence[LoRAPair],
    depth_start_loc: Sequence[int],
    x: Float[Tensor, "n k"],
    out: Float[Tensor, "w m"],
) -> Float[Tensor, "w m"]:
    """`out`, a product of the first W rows of `x`, with each row's pair added in place.

    Args:
        pairs: of the depths; none: nothing is added.
        depth_start_loc: rows depth_start_loc[r] .. depth_start_loc[r + 1] - 1 take pairs[r].
    """
    for pair, (first, end) in zip(pairs, pairwise(depth_start_loc), strict=False):
        last = min(end, out.shape[0])  # rows from W on have no output here
        if first < last:
            out[first:last] += F.linear(F.linear(x[first:last], pair.down), pair.up)
    return out
