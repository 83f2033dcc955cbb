"""`DepthLoRALinear`: a shared matrix with a low-rank (LoRA) pair of matrices for each depth.

Low-rank relaxation of shared layers (Bae et al., "Relaxed Recursive Transformers", arXiv
2410.20672, section 2.3; LoRA: Hu et al., arXiv 2106.09685).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mor.model.sharing import UNSHARED
from mor.ops.low_rank import LoRAPair


class DepthLoRALinear(nn.Linear):
    """y = W x + B_r A_r x at depth r; y = W x with rank 0. No bias, and no scale alpha / rank.

    W (out, in) is shared by all depths, A_r (rank, in) and B_r (out, rank) belong to depth r.
    PEFT calls A_r `lora_A` and B_r `lora_B`; state dicts here call them `delta_down`, `delta_up`.

    Args:
        rank: inner width of the LoRA pairs, cut to full rank; 0: there are none.
        depths: how many pairs there are; 1 serves every depth.
    """

    def __init__(self, in_features: int, out_features: int, rank: int = 0, depths: int = 0) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.delta_down: nn.Parameter | None = None
        """(depths, rank, in): A of each depth; `reset_loras` draws them."""
        self.delta_up: nn.Parameter | None = None
        """(depths, out, rank): B of each depth; 0 at the start."""
        if rank:
            # Beyond min(in, out) a product of two matrices gains no rank, only parameters.
            rank = min(rank, in_features, out_features)
            self.delta_down = nn.Parameter(torch.zeros(depths, rank, in_features))
            self.delta_up = nn.Parameter(torch.zeros(depths, out_features, rank))

    def reset_loras(self, std: float) -> None:
        """Draw A from N(0, std) and set B to 0, so that the layer computes W x at every depth."""
        if self.delta_down is not None and self.delta_up is not None:
            nn.init.normal_(self.delta_down, std=std)
            nn.init.zeros_(self.delta_up)

    def lora(self, depth: int) -> LoRAPair | None:
        """(A_r, B_r) of one depth; None with rank 0, as in prelude and coda.

        A layer with fewer pairs than depths (keys and values that depths share) uses its last one.
        """
        if self.delta_down is None or self.delta_up is None:
            return None
        index = min(depth, len(self.delta_up) - 1)
        return LoRAPair(self.delta_down[index], self.delta_up[index])

    def forward(
        self,
        input: Float[Tensor, "n k"],  # noqa: A002 (torch's name)
        depth: int = UNSHARED,
    ) -> Float[Tensor, "n m"]:
        """W x, plus B_r A_r x where this depth has a LoRA pair."""
        out, pair = super().forward(input), self.lora(depth)
        if pair is None:
            return out
        # A first: (N, rank) in between; B A would be a whole (out, in) matrix.
        return out + nn.functional.linear(nn.functional.linear(input, pair.down), pair.up)
