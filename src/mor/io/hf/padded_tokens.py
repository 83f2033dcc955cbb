"""`PaddedTokens`: the tokens of a padded batch that are no padding, and their positions.

Only these are computed: padding takes no part in routing, attention or losses, so a padded batch
gives what its sequences give one by one.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from mor.errors import RequestError
from mor.io.hf.cache import MoRCache
from mor.model.config import MoRConfig
from mor.model.ragged_batch import RaggedBatch


@dataclass(frozen=True, kw_only=True)
class PaddedTokens:
    """The N of (B, T) new tokens that are no padding, and their positions."""

    present: Bool[Tensor, "b t"]
    """False at padding."""
    positions: Int[Tensor, "b t"]
    """Position of each token in its sequence; -1 at padding."""
    ragged: RaggedBatch

    @classmethod
    def find(
        cls,
        given: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: MoRCache | None,
    ) -> "PaddedTokens":
        """Those of the arguments that `transformers` passes to `forward`.

        Args:
            given: (B, T) ids or (B, T, E) embeddings.
            mask: (B, tokens in the cache + T), 0 at padding.
            positions: (B, T) or (1, T).

        Raises:
            RequestError: the mask does not fit, or hides every token.
        """
        batch, time = shape = given.shape[:2]
        device = given.device
        seen = cache.get_seq_length() if cache is not None else 0
        if mask is not None and tuple(mask.shape) != (batch, seen + time):
            raise RequestError(
                f"attention_mask has shape {tuple(mask.shape)}; {seen} tokens in the cache and "
                f"{time} new ones in {batch} sequences need ({batch}, {seen + time})."
            )
        # Given positions, else those that the mask counts, else those after the cache's.
        if positions is not None:
            positions = positions.to(device).expand(batch, time)
        elif mask is not None:
            positions = (mask.long().cumsum(1) - 1)[:, seen:]
        else:
            positions = torch.arange(time, device=device).expand(batch, time)
            if cache is not None and cache.positions is not None:
                positions = positions + cache.positions.max(1, keepdim=True).values + 1
        present = torch.ones(shape, dtype=torch.bool, device=device)
        if mask is not None:
            present = mask[:, seen:].bool()
        kept, _ = RaggedBatch.full(batch, time, device).select(present.reshape(-1))
        if not kept.num_tokens:
            raise RequestError("attention_mask lets no token through: it is 0 everywhere.")
        # Hidden states hold the present tokens only, so rows are counted among these.
        rows = torch.arange(kept.num_tokens, device=device)
        ragged = replace(kept, token_indices=rows, positions=positions[present])
        return cls(present=present, positions=positions.masked_fill(~present, -1), ragged=ragged)

    def check(self, config: MoRConfig) -> None:
        """Check that positions fit the model and rise along each sequence.

        Raises:
            RequestError: the model does not have one of them, or they do not rise.
        """
        positions, rows = self.ragged.positions, self.ragged.sequence_ids
        if int(positions.max()) >= config.max_position_embeddings:
            raise RequestError(
                f"a token at position {int(positions.max())} does not fit this model: it takes "
                f"max_position_embeddings={config.max_position_embeddings} tokens."
            )
        if not bool(((positions.diff() > 0) | (rows.diff() > 0)).all()):
            raise RequestError(
                "position_ids must rise along each sequence: give packed sequences as rows of "
                "their own, with padding and an attention_mask."
            )

    def without_padding(self, values: Shaped[Tensor, "b t *e"]) -> Shaped[Tensor, "n *e"]:
        """(N, ..) values of the tokens that are no padding, of (B, T, ..) ones."""
        return values[self.present]

    def with_padding(self, values: Shaped[Tensor, "n *e"]) -> Shaped[Tensor, "b t *e"]:
        """(B, T, ..) values with zeros at padding, of (N, ..) ones."""
        shape = (*self.present.shape, *values.shape[1:])
        if values.shape[0] == self.present.numel():
            return values.view(shape)
        rows = self.present.reshape(-1).nonzero()[:, 0]
        whole = values.new_zeros(self.present.numel(), *values.shape[1:])
        return whole.index_copy(0, rows, values).view(shape)
