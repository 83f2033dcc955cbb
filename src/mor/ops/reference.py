"""The engine's operations in plain torch, for any dtype and device; the fast ones must equal them.

Shape letters as in `paged`: N tokens, W tokens that write, E width, H query heads, G key-value
heads, D head size, S slots of a cell.
"""

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mor.ops.paged import AttentionMetadata, PagedKV, RopeTable


def rotate(
    x: Float[Tensor, "n h d"], rotations: RopeTable, metadata: AttentionMetadata
) -> Float[Tensor, "n h d"]:
    """RoPE at each token's position; first and second half of a head form the pairs (Llama)."""
    where = metadata.positions[: x.shape[0]].long()
    cos, sin = rotations.cos[where][:, None].to(x.dtype), rotations.sin[where][:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def store(
    k: Float[Tensor, "w g d"],
    v: Float[Tensor, "w g d"],
    kv: PagedKV,
    layer: int,
    metadata: AttentionMetadata,
) -> None:
    """Put the writing tokens' rotated keys and values into their slots; cell -1 stores nothing."""
    stores = metadata.slot_cells >= 0
    cells, slots = metadata.slot_cells[stores].long() + layer, metadata.slot_offsets[stores].long()
    # One (cell, slot) per token: (w, G, D), whatever lies between the two indices.
    kv.k[cells, :, :, slots] = k[stores].to(kv.k.dtype)
    kv.v[cells, :, slots] = v[stores].to(kv.v.dtype)


def attend(
    q: Float[Tensor, "n h d"], kv: PagedKV, layer: int, metadata: AttentionMetadata
) -> Float[Tensor, "n h d"]:
    """Attention of every token to the first `context_lens` entries of its run's table.

    Where no token of a run sees any, they get zeros.
    """
    out = torch.zeros_like(q)
    bounds, size = metadata.query_start_loc.tolist(), kv.k.shape[3]
    for run, (first, last) in enumerate(itertools.pairwise(bounds)):
        seen = metadata.context_lens[first:last].long()
        if not (reach := int(seen.max())):
            continue
        # The pages of a run side by side, as if it were one sequence of `reach` entries.
        cells = metadata.page_tables[run, : -(-reach // size)].long() + layer
        keys = kv.k[cells].permute(1, 0, 3, 2).flatten(1, 2)[:, :reach]  # (G, entries, D)
        values = kv.v[cells].permute(1, 0, 2, 3).flatten(1, 2)[:, :reach]
        # Causal by number of entries, not by position: a depth may lack some of the positions.
        mask = torch.arange(reach, device=q.device)[None] < seen[:, None]
        out[first:last] = F.scaled_dot_product_attention(
            q[first:last].transpose(0, 1)[None],
            keys[None].to(q.dtype),
            values[None].to(q.dtype),
            attn_mask=mask,
            enable_gqa=q.shape[1] != keys.shape[0],
        )[0].transpose(0, 1)
    return out


def rms_norm(
    x: Float[Tensor, "n e"], weight: Float[Tensor, " e"], eps: float
) -> Float[Tensor, "n e"]:
    """x / rms(x) * weight."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def silu_mul(gate_up: Float[Tensor, "n two_i"]) -> Float[Tensor, "n i"]:
    """silu(gate) * up, the two halves of a row."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
