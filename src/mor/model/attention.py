"""Grouped-query attention with RoPE, and the protocol of the caches that hold its keys and values.

A shared layer runs several times per token, so it cannot own a cache: each call names a `LayerKey`
(depth, layer), and an `AttentionBackend`, which the caller owns, decides what is stored and seen.

Shape letters: N present tokens, B batch, W tokens of the longest sequence, H query heads,
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
from mor.model.norm import RMSNorm
from mor.model.ragged_batch import RaggedBatch
from mor.model.sharing import LayerKey
from mor.ops.document_attention import attend_at, attend_inside
from mor.ops.memory_efficient import rotate


class RotaryEmbedding(NamedTuple):
    """Cosine and sine of every token's rotation angles: position * theta ** (-2 i / D), i < D / 2.

    Su et al., arXiv 2104.09864. Number i of a head rotates with number i + D / 2, as in
    transformers; that paper and llama.cpp rotate neighbors, 2 i with 2 i + 1.
    """

    cos: Float[Tensor, "n 1 half"]
    sin: Float[Tensor, "n 1 half"]

    @classmethod
    def at(
        cls, positions: Int[Tensor, " n"], head_dim: int, theta: float, dtype: torch.dtype
    ) -> "RotaryEmbedding":
        """Those of the given positions: angles computed in fp32, results in `dtype`."""
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
        angles = positions[:, None].float() * (theta ** (-exponents / head_dim))
        return cls(angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype))

    def select(self, rows: Int[Tensor, " m"]) -> "RotaryEmbedding":
        """Those of the tokens in the given rows."""
        return RotaryEmbedding(self.cos.index_select(0, rows), self.sin.index_select(0, rows))

    def rotate(self, x: Float[Tensor, "n hd"]) -> Float[Tensor, "n h d"]:
        """(N, H, D) rotated heads of (N, H * D) queries or keys; `x` itself is overwritten."""
        return rotate(x, self.cos, self.sin).unflatten(1, (-1, 2 * self.cos.shape[-1]))


@runtime_checkable
class AttentionBackend(Protocol):
    """A KV cache together with the attention over it, for one or many forward passes.

    transformers splits this into `Cache.update` and an attention function. Implementations:
    `FullSequenceAttention` (training), `generation.RaggedKVCache` (reference generator),
    `io.hf.cache.MoRCache` (transformers' `generate`).
    """

    def has_kv(self, layer_key: LayerKey) -> bool:
        """Whether another depth has written what this call reads, so that only q is computed."""
        ...

    def attend(
        self,
        layer_key: LayerKey,
        q: Float[Tensor, "n h d"],
        k: Float[Tensor, "n g d"] | None,
        v: Float[Tensor, "n g d"] | None,
        ragged: RaggedBatch,
    ) -> Float[Tensor, "n h d"]:
        """Store k and v (None if `has_kv`), and return the (N, H, D) attention of each query.

        A token at position p sees the entries of its own sequence at positions up to p.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """What a layer call needs besides hidden states: the tokens, RoPE angles and the KV cache."""

    ragged: RaggedBatch
    rope: RotaryEmbedding
    kv: AttentionBackend

    def select(self, ragged: RaggedBatch, rows: Int[Tensor, " m"]) -> "ForwardContext":
        """The context of the tokens in `ragged`, which are these rows of the present ones."""
        return ForwardContext(ragged=ragged, rope=self.rope.select(rows), kv=self.kv)


class FullSequenceAttention(AttentionBackend):
    """Causal attention inside one forward pass over whole sequences, as in training.

    Queries see the present tokens of their own depth (`recursion_wise`), or every token's keys and
    values of depth 0 (`shared`), which are kept until the pass ends.
    """

    def __init__(self, config: MoRConfig, documents: Int[Tensor, " bt"] | None = None) -> None:
        """Keep nothing yet.

        Args:
            config: of the model.
            documents: (B * T,) number of each token's document (`number_documents`): a query
                sees no other document's keys. None: it sees its whole sequence.
        """
        self._kv_policy = config.kv_policy
        self._documents = documents
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (B, G, T, D) keys, values

    def has_kv(self, layer_key: LayerKey) -> bool:
        return not self._kv_policy.writes(layer_key.depth)

    def attend(
        self,
        layer_key: LayerKey,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        ragged: RaggedBatch,
    ) -> Tensor:
        queries = ragged.to_padded(q)  # (B, H, W, D)
        if k is None or v is None:
            # Keys of all tokens, queries of those that came this deep: compare positions.
            keys, values = self._kept[layer_key.layer]
            where = ragged.to_padded(ragged.positions[:, None, None])[:, 0, :, 0]  # (B, W)
            return ragged.from_padded(attend_at(queries, keys, values, where, self._documents))
        keys, values = ragged.to_padded(k), ragged.to_padded(v)
        # Keys that no later depth reads are not held until the pass ends.
        if self._kv_policy.is_read_later(layer_key.depth):
            self._kept[layer_key.layer] = keys, values
        if self._documents is not None:
            return attend_inside(q, k, v, self._documents[ragged.token_indices])
        out = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return ragged.from_padded(out)


class Attention(nn.Module):
    """y = o(softmax(q(x) k(x)^T / sqrt(D)) v(x)): causal grouped-query attention with RoPE.

    With `qk_norm` each head of q(x) and k(x) is normalized before RoPE (Qwen3, arXiv 2505.09388).
    H query heads share G key-value heads, H / G each (Ainslie et al., arXiv 2305.13245). Keys and
    values are held by the caller's `AttentionBackend`. transformers calls it `LlamaAttention`.

    Args:
        rank: of the LoRA pairs that the four matrices have for each depth; 0: none.
    """

    def __init__(self, config: MoRConfig, rank: int = 0) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads_and_dim
        width, inner = config.hidden_size, self.num_heads * self.head_dim
        kv_width, depths = self.num_kv_heads * self.head_dim, config.num_recursions
        kv_depths = config.kv_policy.num_kv_depths(depths)  # who writes no k, v needs no pair
        self.q_proj = DepthLoRALinear(width, inner, rank, depths)
        self.k_proj = DepthLoRALinear(width, kv_width, rank, kv_depths)
        self.v_proj = DepthLoRALinear(width, kv_width, rank, kv_depths)
        self.o_proj = DepthLoRALinear(inner, width, rank, depths)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:  # one weight (D,) for all heads
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Float[Tensor, "n e"], layer_key: LayerKey, context: ForwardContext
    ) -> Float[Tensor, "n e"]:
        """(N, E) attention output of the present tokens over the cache entries of `layer_key`."""
        num, rope, kv = x.shape[0], context.rope, context.kv
        q = rope.rotate(self._norm_heads(self.q_norm, self.q_proj(x, layer_key.depth)))
        k = v = None
        if not kv.has_kv(layer_key):
            k = rope.rotate(self._norm_heads(self.k_norm, self.k_proj(x, layer_key.depth)))
            v = self.v_proj(x, layer_key.depth).view(num, self.num_kv_heads, self.head_dim)
        out = kv.attend(layer_key, q, k, v, context.ragged)
        return self.o_proj(out.reshape(num, self.num_heads * self.head_dim), layer_key.depth)

    def _norm_heads(self, norm: RMSNorm | None, x: Tensor) -> Tensor:
        """(N, H * D) queries or keys, each head normalized if there is a norm."""
        return x if norm is None else norm(x.unflatten(1, (-1, self.head_dim))).flatten(1)
