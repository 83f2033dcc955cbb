"""`RaggedBatch`: which tokens of a batch are present, so that only they are computed.

Dropped tokens leave no holes: hidden states travel as (N, E), all present tokens of all sequences
one after another, each sequence in time order. Since order in time is kept, attention inside a
packed sequence is plainly causal and needs no mask.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RaggedBatch:
    """N present tokens of a (B, T) batch.

    Shape letters: B batch, T time, N packed tokens, W tokens of the longest sequence.
    """

    token_indices: Int[Tensor, " n"]
    """Row of each token in the hidden states of all tokens, from which this packing was taken."""
    positions: Int[Tensor, " n"]
    """Original position of each token in its sequence: what RoPE rotates by, at every depth."""
    batch: int
    width: int
    """W, tokens of the longest sequence."""
    padded_indices: Int[Tensor, " n"] | None
    """Index of each token in a padded (B * W); None if every sequence has W tokens."""

    @classmethod
    def full(cls, batch: int, time: int, device: torch.device) -> "RaggedBatch":
        """Every token of a (B, T) batch."""
        flat = torch.arange(batch * time, device=device)
        return cls(
            token_indices=flat,
            positions=flat % max(time, 1),
            batch=batch,
            width=time,
            padded_indices=None,
        )

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.token_indices.shape[0]

    def select_per_sequence(
        self, index: Int[Tensor, "b k"]
    ) -> tuple["RaggedBatch", Int[Tensor, " n"]]:
        """Keep k tokens of every sequence; needs a packing without ragged ends.

        Args:
            index: (B, k) which of each sequence's W present tokens, rising.

        Returns:
            The smaller packing and the (N',) places of its tokens in this one.
        """
        assert self.padded_indices is None, "a ragged packing has no common width to take from"
        rows = torch.arange(self.batch, device=index.device)[:, None] * self.width
        places = (index + rows).reshape(-1)
        chosen = RaggedBatch(
            token_indices=self.token_indices[places],
            positions=self.positions[places],
            batch=self.batch,
            width=index.shape[1],
            padded_indices=None,
        )
        return chosen, places

    def select(self, keep: Bool[Tensor, " n"]) -> tuple["RaggedBatch", Int[Tensor, " n"]]:
        """Keep the tokens that are marked; sequences may then differ in length.

        Returns:
            The smaller packing and the (N',) places of its tokens in this one.
        """
        places = keep.nonzero().squeeze(1)
        if places.shape[0] == self.num_tokens:
            return self, places
        rows = self.sequence_ids[places]
        lengths = torch.bincount(rows, minlength=self.batch)
        width = int(lengths.max()) if places.shape[0] else 0
        starts = torch.cumsum(lengths, 0) - lengths
        within = torch.arange(places.shape[0], device=places.device) - starts[rows]
        ragged = bool((lengths != width).any())
        chosen = RaggedBatch(
            token_indices=self.token_indices[places],
            positions=self.positions[places],
            batch=self.batch,
            width=width,
            padded_indices=rows * width + within if ragged else None,
        )
        return chosen, places

    @property
    def sequence_ids(self) -> Int[Tensor, " n"]:
        """(N,) the sequence that each token belongs to."""
        if self.padded_indices is not None:
            return self.padded_indices // max(self.width, 1)
        return torch.arange(self.num_tokens, device=self.token_indices.device) // max(self.width, 1)

    @property
    def lengths(self) -> Int[Tensor, " b"]:
        """(B,) present tokens of each sequence."""
        return torch.bincount(self.sequence_ids, minlength=self.batch)

    def to_padded(self, x: Shaped[Tensor, "n h d"]) -> Shaped[Tensor, "b h w d"]:
        """(N, H, D) heads to (B, H, W, D) for attention; short sequences get zeros at their end.

        A causal query never looks past itself, so the padding at the end is never seen.
        """
        if self.padded_indices is not None:
            padded = x.new_zeros(self.batch * self.width, *x.shape[1:])
            x = padded.index_copy(0, self.padded_indices, x)
        return x.view(self.batch, self.width, *x.shape[1:]).transpose(1, 2)

    def from_padded(self, x: Shaped[Tensor, "b h w d"]) -> Shaped[Tensor, "n h d"]:
        """The inverse of `to_padded`."""
        rows = x.transpose(1, 2).reshape(self.batch * self.width, x.shape[1], x.shape[3])
        return rows if self.padded_indices is None else rows.index_select(0, self.padded_indices)
