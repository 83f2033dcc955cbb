"""What a backend of the engine is: it prepares stacks of layers and the head, and runs them.

Here are the two protocols, and how a layer's weights are fused; `torch_backend` and `cpu_backend`
implement them.

Shape letters: N tokens, E width, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mor.model.attention import RotaryEmbedding
from mor.model.config import MoRConfig
from mor.model.depth_lora import DepthLoRALinear
from mor.model.layers import Layer
from mor.model.norm import RMSNorm
from mor.ops.low_rank import LoRAPair
from mor.ops.paged import AttentionMetadata, RopeTable


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """One use of one layer in a stack: a recursive model calls the same layer several times."""

    layer: Layer
    kv_layer: int
    """Which of a page's cells has its keys and values: 0 for the stack's first."""
    writes_kv: bool
    """Whether it stores them; otherwise they are there already."""
    depths: tuple[int, ...] = ()
    """Depth of each range of `AttentionMetadata.depth_start_loc`: whose LoRA pairs its tokens get;
    empty: the layer has none."""


@runtime_checkable
class LayerStack(Protocol):
    """Layers that run one after another."""

    def run(self, x: Float[Tensor, "n e"], metadata: AttentionMetadata) -> Float[Tensor, "n e"]:
        """The states after all layers; x may be overwritten."""
        ...


@runtime_checkable
class KernelBackend(Protocol):
    """What runs a model's layers: it prepares stacks and the head from the model's modules."""

    name: str

    def build_stack(self, calls: Sequence[LayerCall]) -> LayerStack:
        """A stack of layers, ready to run; a layer that occurs twice is prepared once."""
        ...

    def compute_logits(
        self, norm: RMSNorm, weight: Float[Tensor, "v e"], x: Float[Tensor, "n e"]
    ) -> Float[Tensor, "n v"]:
        """Logits: the final norm, and the product with the head's weight."""
        ...

    def greedy(self, logits: Float[Tensor, "n v"]) -> tuple[list[int], list[float]] | None:
        """The likeliest token of each row, and its log-probability.

        Of what `compute_logits` gave. None: no way is faster than the sampler's.
        """
        ...


def layers_of(modules: Iterable[nn.Module]) -> list[Layer]:
    """The modules that are layers, in their order."""
    return [module for module in modules if isinstance(module, Layer)]


def make_rope_table(config: MoRConfig, dtype: torch.dtype, device: torch.device) -> RopeTable:
    """RoPE's cosines and sines for every position that the model takes."""
    _, _, head_dim = config.num_heads_and_dim
    positions = torch.arange(config.max_position_embeddings, device=device)
    cos, sin = RotaryEmbedding.at(positions, head_dim, config.rope_theta, dtype)
    # (T, 1, D / 2), for heads to broadcast: the kernels read (T, D / 2).
    return RopeTable(cos=cos[:, 0].contiguous(), sin=sin[:, 0].contiguous())


def fused_weights(layer: Layer) -> list[Tensor]:
    """The matrices of a layer's five products: q, k and v, o, gate and up, down."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        attention.q_proj.weight,
        torch.cat((attention.k_proj.weight, attention.v_proj.weight)),
        attention.o_proj.weight,
        torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)),
        mlp.down_proj.weight,
    ]


def fused_loras(call: LayerCall, dtype: torch.dtype) -> list[list[LoRAPair]]:
    """For each of `fused_weights` the LoRA pairs of the depths that tokens may be at."""
    attention, mlp = call.layer.self_attn, call.layer.mlp
    products: Sequence[tuple[DepthLoRALinear, ...]] = (
        (attention.q_proj,),
        (attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
    return [
        [
            # Only a layer with LoRA has depths: no pair is None here.
            LoRAPair.fused([p for m in linears if (p := m.lora(depth)) is not None], dtype)
            for depth in call.depths
        ]
        for linears in products
    ]
