"""The Llama layer: RMSNorm -> attention -> +residual -> RMSNorm -> SwiGLU -> +residual."""

from jaxtyping import Float
from torch import Tensor, nn

from mor.model.attention import Attention, ForwardContext
from mor.model.config import MoRConfig
from mor.model.depth_lora import DepthLoRALinear
from mor.model.norm import RMSNorm
from mor.model.sharing import UNSHARED, LayerKey
from mor.ops.memory_efficient import swiglu


class SwiGLU(nn.Module):
    """y = down(silu(gate(x)) * up(x)), the products with a LoRA pair at each depth.

    Shazeer, arXiv 2002.05202. transformers calls it `LlamaMLP`, torchtitan `FeedForward`
    (w1 = gate, w2 = down, w3 = up).
    """

    def __init__(self, config: MoRConfig, rank: int = 0) -> None:
        super().__init__()
        width, inner, depths = config.hidden_size, config.intermediate_size, config.num_recursions
        self.gate_proj = DepthLoRALinear(width, inner, rank, depths)
        self.up_proj = DepthLoRALinear(width, inner, rank, depths)
        self.down_proj = DepthLoRALinear(inner, width, rank, depths)

    def forward(self, x: Float[Tensor, "n e"], depth: int = UNSHARED) -> Float[Tensor, "n e"]:
        """(N, E) output for each of the N tokens, all of which are at `depth`."""
        gate, up = self.gate_proj(x, depth), self.up_proj(x, depth)
        return swiglu(gate, up, lambda inner: self.down_proj(inner, depth))


class Layer(nn.Module):
    """h = x + attention(norm1(x)); y = h + mlp(norm2(h)): a pre-norm Llama layer.

    transformers calls it `LlamaDecoderLayer`, torchtitan `TransformerBlock`. Here "block" is all
    the layers that are shared by the depths.

    Args:
        rank: of the LoRA pairs that a shared layer has for each depth; 0: none.
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
        """(N, E) states after the layer; its keys and values are stored under `layer_key`."""
        # The sums' arrays come first: what the parts need for a while then leaves no holes between
        # arrays that stay, which glibc cannot fill with one of the same size.
        x = x.clone().add_(self.self_attn(self.input_layernorm(x), layer_key, context))
        return x.clone().add_(self.mlp(self.post_attention_layernorm(x), layer_key.depth))
