"""`MoRCache`: the ragged KV cache that `generate` of `transformers` passes from step to step."""

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache

from mor.model.attention import FullSequenceAttention
from mor.model.config import MoRConfig
from mor.model.ragged_batch import RaggedBatch
from mor.model.sharing import LayerKey

_NOWHERE = 1 << 40  # the position of an entry that is not there
_GROWTH = 64


class MoRCache(Cache):
    """Keys and values of every (depth, layer); each sequence holds only the tokens that were there.

    Implements `AttentionBackend`. A layer key's tensors are (B, S, G, D), each row filled from the
    left. The config's `KVPolicy` says which depths write and which of them are read. Gradients do
    not flow through a cache.

    Shape letters: B batch, T time, W tokens of the longest row, S entries, G key-value heads,
    D head size.
    """

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(layers=[])
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Drop all entries, as if new."""
        # (B, S, G, D) keys, (B, S, G, D) values, (B, S) positions
        self._kept: dict[LayerKey, tuple[Tensor, Tensor, Tensor]] = {}
        # Attention of the first pass, which has nothing to look back to; None afterwards.
        self._first_pass: FullSequenceAttention | None = FullSequenceAttention(self.config)
        self.positions: Tensor | None = None
        """(B, tokens so far) position of each token, -1 at padding."""
        self.recursion_counts: Tensor | None = None
        """(B, tokens so far) passes that each token took, 0 at padding."""

    # -- the model's side -------------------------------------------------------------------------

    def has_kv(self, layer_key: LayerKey) -> bool:
        """Whether another depth has written what this call reads."""
        return not self.config.kv_policy.writes(layer_key.depth)

    def attend(
        self,
        layer_key: LayerKey,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        ragged: RaggedBatch,
    ) -> Tensor:
        """Append k and v, then let each query see the entries up to its own position."""
        if k is not None and v is not None:
            self._append(layer_key, k.detach(), v.detach(), ragged)
        if self._first_pass is not None:
            return self._first_pass.attend(layer_key, q, k, v, ragged)
        read = layer_key._replace(depth=self.config.kv_policy.kv_depth(layer_key.depth))
        keys, values, held = self._kept[read]
        where = ragged.to_padded(ragged.positions[:, None, None])[:, 0, :, 0]  # (B, W)
        seen = held[:, None, None, :] <= where[:, None, :, None]
        seen[..., 0] = True  # true for every token; gives the padding of short rows a finite answer
        out = F.scaled_dot_product_attention(
            ragged.to_padded(q),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=seen,
            enable_gqa=q.shape[1] != keys.shape[2],
        )
        return ragged.from_padded(out)

    def _append(self, layer_key: LayerKey, k: Tensor, v: Tensor, ragged: RaggedBatch) -> None:
        if layer_key not in self._kept:
            empty = k.new_empty(ragged.batch, 0, *k.shape[1:])
            nowhere = ragged.positions.new_empty(ragged.batch, 0)
            self._kept[layer_key] = empty, empty, nowhere
        rows, (keys, values, held) = ragged.sequence_ids, self._kept[layer_key]
        new = torch.bincount(rows, minlength=ragged.batch)  # (B,) new entries of each sequence
        within = torch.arange(len(rows), device=rows.device) - (new.cumsum(0) - new)[rows]
        filled = (held != _NOWHERE).sum(1)  # (B,) entries so far
        # All rows grow together, by at least `_GROWTH`: most steps then copy nothing.
        missing = int((filled + new).max()) - held.shape[1]
        if missing > 0:
            room = -(-missing // _GROWTH) * _GROWTH
            keys, values = (F.pad(x, (0, 0, 0, 0, 0, room)) for x in (keys, values))
            held = F.pad(held, (0, room), value=_NOWHERE)
        at = rows, filled[rows] + within
        # Out of place where a backward pass may still want what was there.
        put = torch.Tensor.index_put if torch.is_grad_enabled() else torch.Tensor.index_put_
        self._kept[layer_key] = (
            put(keys, at, k),
            put(values, at, v),
            put(held, at, ragged.positions),
        )

    def advance(self, positions: Int[Tensor, "b t"], counts: Int[Tensor, "b t"]) -> None:
        """Add the (B, T) tokens of a forward pass that has ended."""
        self._first_pass = None
        if self.positions is not None and self.recursion_counts is not None:
            positions = torch.cat((self.positions, positions), dim=1)
            counts = torch.cat((self.recursion_counts, counts), dim=1)
        self.positions, self.recursion_counts = positions, counts

    # -- the side of `generate` -------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included."""
        return 0 if self.positions is None else self.positions.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1, like `get_max_length`, whose name this is in transformers 4."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """False: shapes depend on what the routers decide."""
        return False

    def __len__(self) -> int:
        return len(self._kept)

    def reorder_cache(self, beam_idx: Int[Tensor, " b"]) -> None:
        """Replace each row i by row `beam_idx[i]`."""
        if self.positions is None or self.recursion_counts is None:
            return
        for layer_key, kept in self._kept.items():
            keys, values, held = (x.index_select(0, beam_idx.to(x.device)) for x in kept)
            self._kept[layer_key] = keys, values, held
        self.positions = self.positions.index_select(0, beam_idx)
        self.recursion_counts = self.recursion_counts.index_select(0, beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " b"]) -> None:
        """Keep the rows with these indices."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, copies side by side."""
        if self.positions is not None:
            rows = torch.arange(self.positions.shape[0], device=self.positions.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def crop(self, num_tokens: int) -> None:
        """Drop the last `-num_tokens` tokens; if it is positive, keep so many."""
        if self.positions is None or self.recursion_counts is None:
            return
        left = num_tokens if num_tokens > 0 else self.get_seq_length() + num_tokens
        self.positions = self.positions[:, :left]
        self.recursion_counts = self.recursion_counts[:, :left]
        last = self.positions.max(1, keepdim=True).values
        for layer_key, (keys, values, held) in self._kept.items():
            self._kept[layer_key] = keys, values, held.masked_fill(held > last, _NOWHERE)
