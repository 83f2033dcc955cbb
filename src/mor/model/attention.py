"""Grouped-query attention with RoPE, and who holds its keys and values.

A shared layer runs several times per token, so it cannot own a cache: each call names a `LayerKey`
(depth, layer), and an `AttentionBackend`, which the caller owns, decides what is stored and seen.

Shape letters: N packed tokens, B batch, W tokens of the longest sequence, H query heads,
G key-value heads, D head size, E width.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mor.model.config import MoRConfig
from mor.model.depth_lora import DepthLoRALinear
from mor.model.ragged_batch import RaggedBatch
from mor.model.sharing import LayerKey
from mor.ops.document_attention import attend_at, attend_inside
from mor.ops.memory_efficient import rotate


class RotaryEmbedding(NamedTuple):
    """Cosine and sine of every token's rotation angles, each (N, 1, D / 2)."""

    cos: Float[Tensor, "n 1 half"]
    sin: Float[Tensor, "n 1 half"]

    @classmethod
    def at(
        cls, positions: Int[Tensor, " n"], head_dim: int, theta: float, dtype: torch.dtype
    ) -> "RotaryEmbedding":
        """Angles for the given positions, computed in fp32 whatever the model's dtype."""
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
        angles = positions[:, None].float() * (theta ** (-exponents / head_dim))
        return cls(angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype))

    def select(self, places: Int[Tensor, " m"]) -> "RotaryEmbedding":
        """The angles of some of the tokens."""
        return RotaryEmbedding(self.cos.index_select(0, places), self.sin.index_select(0, places))

    def rotate(self, x: Float[Tensor, "n hd"]) -> Float[Tensor, "n h d"]:
        """Rotate all heads' queries or keys, in place; see `ops.lean.rotate`."""
        return rotate(x, self.cos, self.sin).unflatten(1, (-1, 2 * self.cos.shape[-1]))


@runtime_checkable
class AttentionBackend(Protocol):
    """Owner of keys and values during one or many forward passes."""

    def has_kv(self, layer_key: LayerKey) -> bool:
        """Whether this slot's keys and values are there already, so only queries are needed."""
        ...

    def attend(
        self,
        layer_key: LayerKey,
        q: Float[Tensor, "n h d"],
        k: Float[Tensor, "n g d"] | None,
        v: Float[Tensor, "n g d"] | None,
        ragged: RaggedBatch,
    ) -> Float[Tensor, "n h d"]:
        """Store k and v (None if `has_kv`) and attend from q to what its tokens may see."""
        ...


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """What a layer needs besides hidden states: who is present, their angles, their KV's owner."""

    ragged: RaggedBatch
    rope: RotaryEmbedding
    kv: AttentionBackend

    def select(self, ragged: RaggedBatch, places: Int[Tensor, " m"]) -> "ForwardContext":
        """The context of some of the tokens: those at `places`."""
        return ForwardContext(ragged=ragged, rope=self.rope.select(places), kv=self.kv)


class FullSequenceAttention:
    """Keys and values of one forward pass over whole sequences: nothing outlives the pass.

    `recursion_wise`: a slot sees the tokens that are in it. `shared`: every depth of a layer sees
    depth 0's keys and values, which belong to all tokens.
    """

    def __init__(self, config: MoRConfig, documents: Int[Tensor, " bt"] | None = None) -> None:
        """Args:
        config: of the model.
        documents: (B * T,) number of each token's document, see `number_documents`: a query
            sees no other document's keys. None: it sees its whole sequence.
        """
        self._kv_policy = config.kv_policy
        self._documents = documents
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (B, G, T, D) keys, values

    def has_kv(self, layer_key: LayerKey) -> bool:
        """True below depth 0 when depths share their keys and values."""
        return not self._kv_policy.writes(layer_key.depth)

    def attend(
        self,
        layer_key: LayerKey,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        ragged: RaggedBatch,
    ) -> Tensor:
        """Causal attention; see `AttentionBackend.attend`."""
        queries = ragged.to_padded(q)
        if k is None or v is None:
            keys, values = self._kept[layer_key.layer]
            where = ragged.to_padded(ragged.positions[:, None, None])[:, 0, :, 0]  # (B, W)
            return ragged.from_padded(attend_at(queries, keys, values, where, self._documents))
        keys, values = ragged.to_padded(k), ragged.to_padded(v)
        if self._kv_policy.is_read_later(layer_key.depth):
            self._kept[layer_key.layer] = keys, values
        if self._documents is not None:
            return attend_inside(q, k, v, self._documents[ragged.token_indices])
        out = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return ragged.from_padded(out)


class Attention(nn.Module):
    """Projections of one layer; owns no state besides its weights."""

    def __init__(self, config: MoRConfig, rank: int = 0) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads_and_dim
        width, inner = config.hidden_size, self.num_heads * self.head_dim
        kv_width, depths = self.num_kv_heads * self.head_dim, config.num_recursions
        kv_depths = config.kv_policy.num_kv_depths(depths)
        self.q_proj = DepthLoRALinear(width, inner, rank, depths)
        self.k_proj = DepthLoRALinear(width, kv_width, rank, kv_depths)
        self.v_proj = DepthLoRALinear(width, kv_width, rank, kv_depths)
        self.o_proj = DepthLoRALinear(inner, width, rank, depths)

    def forward(
        self, x: Float[Tensor, "n e"], layer_key: LayerKey, context: ForwardContext
    ) -> Float[Tensor, "n e"]:
        """Attention of the packed tokens to what the KV's owner lets them see in `slot`."""
        num, rope, kv = x.shape[0], context.rope, context.kv
        q = rope.rotate(self.q_proj(x, layer_key.depth))
        k = v = None
        if not kv.has_kv(layer_key):
            k = rope.rotate(self.k_proj(x, layer_key.depth))
            v = self.v_proj(x, layer_key.depth).view(num, self.num_kv_heads, self.head_dim)
        out = kv.attend(layer_key, q, k, v, context.ragged)
        return self.o_proj(out.reshape(num, self.num_heads * self.head_dim), layer_key.depth)
