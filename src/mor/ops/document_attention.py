"""Attention of whole sequences inside documents, or of some queries to all keys, in training.

Shape letters: N packed tokens, B batch, W queries of a sequence, T time, H query heads, G key-value
heads, D head size.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_QUERY_CHUNK = 128  # queries whose mask and scores exist at once


def number_documents(ids: Int[Tensor, "b t"], end: int) -> Int[Tensor, " bt"]:
    """Index of each token's document, counted through the whole batch, from 1 on.

    A document ends with the id `end`; each row of the batch begins a new one.
    """
    begins = (ids == end).roll(1, dims=1)  # the token after an end begins a document
    begins[:, 0] = True
    return begins.reshape(-1).cumsum(0)


def attend_inside(
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
    # Documents of one width are a batch: padding at most doubles their length.
    outs, places = list[Tensor](), list[Tensor]()
    for width in widths.unique().tolist():
        mine = widths == width
        within = torch.arange(width, device=q.device)
        rows = starts[mine, None] + within  # (documents, width)
        there = within < lengths[mine, None]  # (documents, width): a token, not padding
        q_rows, k_rows, v_rows = (
            x[rows.clamp(max=x.shape[0] - 1)].transpose(1, 2) for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(
            q_rows, k_rows, v_rows, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        outs.append(out.transpose(1, 2)[there])
        places.append(rows[there])
    # Back from the order of widths into the order of tokens.
    return torch.cat(outs).index_select(0, torch.cat(places).argsort())


def attend_at(
    q: Float[Tensor, "b h w d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b g t d"],
    positions: Int[Tensor, "b w"],
    documents: Int[Tensor, " bt"] | None = None,
) -> Float[Tensor, "b h w d"]:
    """Causal attention of queries at some positions to all T keys, or to those of their document.

    In chunks of queries, each over the keys up to its last position, so that no (W, T) mask is
    ever whole; a chunk's mask is rebuilt in the backward pass instead of kept.
    """
    owners = None if documents is None else documents.view(len(positions), -1)  # (B, T)

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
        reach = int(where.max()) + 1  # keys behind a chunk's last position are seen by no query
        args = (q[:, :, start : start + _QUERY_CHUNK], k[:, :, :reach], v[:, :, :reach], where)
        if torch.is_grad_enabled():
            outs.append(checkpoint(chunk, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            outs.append(chunk(*args))
    return torch.cat(outs, dim=2)
