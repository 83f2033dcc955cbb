"""The Llama layer: RMSNorm -> attention -> +residual -> RMSNorm -> SwiGLU -> +residual."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mor.model.attention import Attention, ForwardContext
from mor.model.config import MoRConfig
from mor.model.depth_lora import DepthLoRALinear
from mor.model.sharing import UNSHARED, LayerKey
from mor.ops.memory_efficient import rms_norm, swiglu


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken in fp32 (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*n e"]) -> Float[Tensor, "*n e"]:
        """Normalize the last axis."""
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config: MoRConfig, rank: int = 0) -> None:
        super().__init__()
        width, inner, depths = config.hidden_size, config.intermediate_size, config.num_recursions
        self.gate_proj = DepthLoRALinear(width, inner, rank, depths)
        self.up_proj = DepthLoRALinear(width, inner, rank, depths)
        self.down_proj = DepthLoRALinear(inner, width, rank, depths)

    def forward(self, x: Float[Tensor, "n e"], depth: int = UNSHARED) -> Float[Tensor, "n e"]:
        """Feed-forward of each token."""
        gate, up = self.gate_proj(x, depth), self.up_proj(x, depth)
        return swiglu(gate, up, lambda inner: self.down_proj(inner, depth))


class Layer(nn.Module):
    """One Transformer layer; its own residuals are inside.

    Args:
        rank: of the deltas that a shared layer has at each depth; 0: none.
    """

    def __init__(self, config: MoRConfig, rank: int = 0) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rank)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config, rank)

    def forward(
        self, x: Float[Tensor, "n e"], layer_key: LayerKey, context: ForwardContext
    ) -> Float[Tensor, "n e"]:
        """One application of the layer to the packed tokens, its keys and values kept in `slot`."""
        # The sums' arrays come first: what the parts need for a while then leaves no holes between
        # arrays that stay, which glibc cannot fill with one of the same size.
        x = x.clone().add_(self.self_attn(self.input_layernorm(x), layer_key, context))
        return x.clone().add_(self.mlp(self.post_attention_layernorm(x), layer_key.depth))
