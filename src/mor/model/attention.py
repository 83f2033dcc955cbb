"""Grouped-query attention with RoPE, and who holds its keys and values.

A shared layer runs several times per token, so it cannot own a cache: each call names a `Slot`
(depth, layer), and a `KVAccess` that the caller owns decides what is stored and what is seen.

Shape letters: N packed tokens, B batch, W tokens of the longest sequence, H query heads,
G key-value heads, D head size, E width.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mor.model.config import MoRConfig
from mor.model.packing import Packing
from mor.model.sharing import Slot

_QUERY_CHUNK = 128


class Rope(NamedTuple):
    """Cosine and sine of every token's rotation angles, each (N, 1, D / 2)."""

    cos: Float[Tensor, "n 1 half"]
    sin: Float[Tensor, "n 1 half"]

    @classmethod
    def at(
        cls, positions: Int[Tensor, " n"], head_dim: int, theta: float, dtype: torch.dtype
    ) -> "Rope":
        """Angles for the given positions, computed in fp32 whatever the model's dtype."""
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
        angles = positions[:, None].float() * (theta ** (-exponents / head_dim))
        return cls(angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype))

    def take(self, places: Int[Tensor, " m"]) -> "Rope":
        """The angles of some of the tokens."""
        return Rope(self.cos.index_select(0, places), self.sin.index_select(0, places))

    def rotate(self, x: Float[Tensor, "n h d"]) -> Float[Tensor, "n h d"]:
        """Rotate queries or keys; first and second half of a head form the pairs, as in Llama."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = self
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@runtime_checkable
class KVAccess(Protocol):
    """Owner of keys and values during one or many forward passes."""

    def has_kv(self, slot: Slot) -> bool:
        """Whether this slot's keys and values are there already, so only queries are needed."""
        ...

    def attend(
        self,
        slot: Slot,
        q: Float[Tensor, "n h d"],
        k: Float[Tensor, "n g d"] | None,
        v: Float[Tensor, "n g d"] | None,
        packing: Packing,
    ) -> Float[Tensor, "n h d"]:
        """Store k and v (None if `has_kv`) and attend from q to what its tokens may see."""
        ...


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a layer needs besides hidden states: who is present, their angles, their KV's owner."""

    packing: Packing
    rope: Rope
    kv: KVAccess

    def narrow(self, packing: Packing, places: Int[Tensor, " m"]) -> "Context":
        """The context of some of the tokens: those at `places`."""
        return Context(packing=packing, rope=self.rope.take(places), kv=self.kv)


class WholeSequence:
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
        self._shared = config.kv_strategy == "shared"
        self._documents = documents
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (B, G, T, D) keys, values

    def has_kv(self, slot: Slot) -> bool:
        """True below depth 0 when depths share their keys and values."""
        return self._shared and slot.depth > 0

    def attend(
        self, slot: Slot, q: Tensor, k: Tensor | None, v: Tensor | None, packing: Packing
    ) -> Tensor:
        """Causal attention; see `KVAccess.attend`."""
        queries = packing.to_rows(q)
        if k is None or v is None:
            keys, values = self._kept[slot.layer]
            return packing.from_rows(_attend_at(queries, keys, values, packing, self._documents))
        keys, values = packing.to_rows(k), packing.to_rows(v)
        if self._shared and slot.depth == 0:
            self._kept[slot.layer] = keys, values
        if self._documents is not None:
            return _attend_inside(q, k, v, self._documents[packing.flat])
        out = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return packing.from_rows(out)


def number_documents(ids: Int[Tensor, "b t"], end: int) -> Int[Tensor, " bt"]:
    """Number of each token's document, rising through the batch.

    A document ends with the id `end`; each row of the batch begins a new one.
    """
    begins = (ids == end).roll(1, dims=1)
    begins[:, 0] = True
    return begins.reshape(-1).cumsum(0)


def _attend_inside(
    q: Float[Tensor, "n h d"],
    k: Float[Tensor, "n g d"],
    v: Float[Tensor, "n g d"],
    documents: Int[Tensor, " n"],
) -> Float[Tensor, "n h d"]:
    """Causal attention of packed tokens, each among those of its own document.

    Documents are runs of the packed tokens. Those whose lengths have the same next power of two go
    together, padded at their end, where no causal query looks: no mask, no (T, T) anything.
    """
    lengths = torch.unique_consecutive(documents, return_counts=True)[1]
    starts = lengths.cumsum(0) - lengths
    widths = starts.new_tensor([1 << (length - 1).bit_length() for length in lengths.tolist()])
    outs, places = list[Tensor](), list[Tensor]()
    for width in widths.unique().tolist():
        mine = widths == width
        within = torch.arange(width, device=q.device)
        rows = starts[mine, None] + within  # (documents, width)
        there = within < lengths[mine, None]
        q_rows, k_rows, v_rows = (
            x[rows.clamp(max=x.shape[0] - 1)].transpose(1, 2) for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(
            q_rows, k_rows, v_rows, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        outs.append(out.transpose(1, 2)[there])
        places.append(rows[there])
    return torch.cat(outs).index_select(0, torch.cat(places).argsort())


def _attend_at(
    q: Float[Tensor, "b h w d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b g t d"],
    packing: Packing,
    documents: Int[Tensor, " bt"] | None = None,
) -> Float[Tensor, "b h w d"]:
    """Queries at scattered positions over the keys of all T positions, or of their own document.

    In chunks of queries, each over the keys up to its last position, so that no (W, T) mask is
    ever whole; a chunk's mask is rebuilt in the backward pass instead of kept.
    """
    positions = packing.to_rows(packing.positions[:, None, None])[:, 0, :, 0]  # (B, W)
    owners = None if documents is None else documents.view(packing.batch, -1)  # (B, T)

    def chunk(queries: Tensor, keys: Tensor, values: Tensor, where: Tensor) -> Tensor:
        times = torch.arange(keys.shape[2], device=keys.device)
        seen = (times[None, None] <= where[:, :, None])[:, None]  # (B, 1, chunk, keys)
        if owners is not None:
            own = owners.gather(1, where)[:, :, None] == owners[:, None, : keys.shape[2]]
            seen = seen & own[:, None]
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=seen, enable_gqa=queries.shape[1] != keys.shape[1]
        )

    outs = []
    for start in range(0, q.shape[2], _QUERY_CHUNK):
        where = positions[:, start : start + _QUERY_CHUNK]
        reach = int(where.max()) + 1
        args = (q[:, :, start : start + _QUERY_CHUNK], k[:, :, :reach], v[:, :, :reach], where)
        if torch.is_grad_enabled():
            outs.append(checkpoint(chunk, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            outs.append(chunk(*args))
    return torch.cat(outs, dim=2)


class Attention(nn.Module):
    """Projections of one layer; owns no state besides its weights."""

    def __init__(self, config: MoRConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads_and_dim
        width = config.hidden_size
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=False)

    def forward(
        self, x: Float[Tensor, "n e"], slot: Slot, context: Context
    ) -> Float[Tensor, "n e"]:
        """Attention of the packed tokens to what the KV's owner lets them see in `slot`."""
        num, rope, kv = x.shape[0], context.rope, context.kv
        q = rope.rotate(self.q_proj(x).view(num, self.num_heads, self.head_dim))
        k = v = None
        if not kv.has_kv(slot):
            k = rope.rotate(self.k_proj(x).view(num, self.num_kv_heads, self.head_dim))
            v = self.v_proj(x).view(num, self.num_kv_heads, self.head_dim)
        out = kv.attend(slot, q, k, v, context.packing)
        return self.o_proj(out.reshape(num, self.num_heads * self.head_dim))
