"""`RaggedBatch`: the tokens of a batch that are present at a depth, so that only they are computed.

Tokens that left are not padded: hidden states are (N, E), the present tokens of all sequences one
after another, each sequence in time order. torch calls such a batch a jagged nested tensor,
FlashAttention a variable-length ("varlen") batch.

    sequences     a0 a1 a2 a3 | b0 b1 b2 b3
    present       a0    a2 a3 |    b1
    N = 4 rows    a0 a2 a3 b1          positions 0 2 3 1, sequence_ids 0 0 0 1
    padded        a0 a2 a3 | b1 -- --  W = 3, padded_indices 0 1 2 3

Since the order in time is kept, attention among the present tokens of a sequence is plainly causal
and needs no mask.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RaggedBatch:
    """N present tokens of a (B, T) batch.

    Shape letters: B batch, T time, N present tokens, W present tokens of the longest sequence.
    """

    token_indices: Int[Tensor, " n"]
    """Row of each token in the hidden states of the whole batch, where results are written back."""
    positions: Int[Tensor, " n"]
    """Original position of each token in its sequence: what RoPE rotates by, at every depth."""
    batch: int
    """B, sequences, also those without a present token."""
    width: int
    """W, present tokens of the longest sequence."""
    padded_indices: Int[Tensor, " n"] | None
    """Row of each token in a padded (B * W, E); None if every sequence has W tokens."""

    @classmethod
    def full(cls, batch: int, time: int, device: torch.device) -> "RaggedBatch":
        """The batch of all B * T tokens."""
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
        """Keep the same number k of tokens in every sequence; all must have W tokens.

        Args:
            index: (B, k) which of each sequence's W present tokens, rising.

        Returns:
            The batch of B * k tokens, and the (B * k,) rows of these tokens in this batch.
        """
        assert self.padded_indices is None, "sequences of different lengths have no common width"
        starts = torch.arange(self.batch, device=index.device)[:, None] * self.width
        rows = (index + starts).reshape(-1)
        chosen = RaggedBatch(
            token_indices=self.token_indices[rows],
            positions=self.positions[rows],
            batch=self.batch,
            width=index.shape[1],
            padded_indices=None,
        )
        return chosen, rows

    def select(self, keep: Bool[Tensor, " n"]) -> tuple["RaggedBatch", Int[Tensor, " n"]]:
        """Keep the tokens that are marked; sequences may then differ in length.

        Returns:
            The batch of the N' kept tokens, and the (N',) rows of these tokens in this batch.
        """
        rows = keep.nonzero().squeeze(1)
        if rows.shape[0] == self.num_tokens:
            return self, rows
        sequence_ids = self.sequence_ids[rows]
        lengths = torch.bincount(sequence_ids, minlength=self.batch)  # (B,)
        width = int(lengths.max()) if rows.shape[0] else 0
        starts = torch.cumsum(lengths, 0) - lengths  # (B,) first row of each sequence
        within = torch.arange(rows.shape[0], device=rows.device) - starts[sequence_ids]
        is_ragged = bool((lengths != width).any())
        chosen = RaggedBatch(
            token_indices=self.token_indices[rows],
            positions=self.positions[rows],
            batch=self.batch,
            width=width,
            padded_indices=sequence_ids * width + within if is_ragged else None,
        )
        return chosen, rows

    @property
    def sequence_ids(self) -> Int[Tensor, " n"]:
        """(N,) index, 0 .. B - 1, of the sequence that each token belongs to."""
        if self.padded_indices is not None:
            return self.padded_indices // max(self.width, 1)
        return torch.arange(self.num_tokens, device=self.token_indices.device) // max(self.width, 1)

    @property
    def lengths(self) -> Int[Tensor, " b"]:
        """(B,) present tokens of each sequence."""
        return torch.bincount(self.sequence_ids, minlength=self.batch)

    def to_padded(self, x: Shaped[Tensor, "n h d"]) -> Shaped[Tensor, "b h w d"]:
        """(N, H, D) heads as (B, H, W, D) for attention, shorter sequences with zeros at their end.

        A causal query never looks past itself, so these zeros are never seen.
        """
        if self.padded_indices is not None:
            padded = x.new_zeros(self.batch * self.width, *x.shape[1:])
            x = padded.index_copy(0, self.padded_indices, x)
        return x.view(self.batch, self.width, *x.shape[1:]).transpose(1, 2)

    def from_padded(self, x: Shaped[Tensor, "b h w d"]) -> Shaped[Tensor, "n h d"]:
        """(B, H, W, D) heads as (N, H, D): the inverse of `to_padded`."""
        rows = x.transpose(1, 2).reshape(self.batch * self.width, x.shape[1], x.shape[3])
        return rows if self.padded_indices is None else rows.index_select(0, self.padded_indices)
