"""Layers that are shared, but not quite: each depth adds a thin matrix of its own.

Low-rank relaxation (Bae et al., "Relaxed Recursive Transformers", arXiv 2410.20672, section 2.3):
what the block's layers lose by being the same at every depth, a LoRA for each depth gives back.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mor.model.sharing import UNSHARED
from mor.ops.low_rank import LoRAPair


class DepthLoRALinear(nn.Linear):
    """y = W x, or y = W x + B_r A_r x at depth r; without bias.

    Args:
        rank: of the deltas, at most full rank; 0: there are none.
        depths: R, how many deltas there are.
    """

    def __init__(self, in_features: int, out_features: int, rank: int = 0, depths: int = 0) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.delta_down: nn.Parameter | None = None
        """(R, rank, in): A of each depth; `reset_loras` draws them."""
        self.delta_up: nn.Parameter | None = None
        """(R, out, rank): B of each depth; 0 at the start."""
        if rank:
            rank = min(rank, in_features, out_features)
            self.delta_down = nn.Parameter(torch.zeros(depths, rank, in_features))
            self.delta_up = nn.Parameter(torch.zeros(depths, out_features, rank))

    def reset_loras(self, std: float) -> None:
        """Draw A anew and make B zero: the function of the shared matrix alone."""
        if self.delta_down is not None and self.delta_up is not None:
            nn.init.normal_(self.delta_down, std=std)
            nn.init.zeros_(self.delta_up)

    def lora(self, depth: int) -> LoRAPair | None:
        """The delta of one depth, or that of depth 0 if it serves all; None where there is none."""
        if self.delta_down is None or self.delta_up is None:
            return None
        mine = min(depth, len(self.delta_up) - 1)
        return LoRAPair(self.delta_down[mine], self.delta_up[mine])

    def forward(
        self,
        input: Float[Tensor, "n k"],  # noqa: A002 (torch's name)
        depth: int = UNSHARED,
    ) -> Float[Tensor, "n m"]:
        """The product, and at a depth its delta's."""
        out, delta = super().forward(input), self.lora(depth)
        if delta is None:
            return out
        return out + nn.functional.linear(nn.functional.linear(input, delta.down), delta.up)
