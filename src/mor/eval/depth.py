"""Recursion counts of tokens: histograms, means, and the vocabulary entries that go deepest.

All counts are those of the causal `threshold` rule, by which text is generated.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mor.io.tokenizer import Tokenizer
from mor.model.transformer import MoRModel


@dataclass(frozen=True, kw_only=True)
class TokenDepth:
    """Mean recursion count of one entry of the vocabulary on some text."""

    token_id: int
    piece: str
    """Text of the token; an incomplete character is U+FFFD."""
    mean_recursions: float
    occurrences: int
    """How often it was read."""


def depth_histogram(counts: Iterable[int], num_recursions: int) -> tuple[float, ...]:
    """(R + 1,) share of the tokens with 0, 1, .. R recursions; all 0 without tokens."""
    numbers = [0] * (num_recursions + 1)
    for count in counts:
        numbers[count] += 1
    total = max(1, sum(numbers))
    return tuple(number / total for number in numbers)


def mean_recursions(histogram: Sequence[float]) -> float:
    """Mean recursions per token, of an (R + 1,) histogram of shares."""
    return sum(count * share for count, share in enumerate(histogram))


@torch.no_grad()
def recursion_counts(model: MoRModel, token_ids: Sequence[int]) -> list[int]:
    """The recursion counts, (T,), of the tokens of one sequence.

    Raises:
        RequestError: the sequence is empty or too long for the model.
    """
    was_training = model.training
    model.eval()
    ids = torch.tensor([list(token_ids)], device=model.embed_tokens.weight.device)
    _, counts, _ = model.hidden_states(ids, "threshold")
    model.train(was_training)
    return counts.tolist()


@torch.no_grad()
def tokens_by_depth(
    model: MoRModel,
    tokenizer: Tokenizer,
    batches: Iterable[Tensor],
    document_end: int | None = None,
) -> list[TokenDepth]:
    """Mean recursion count of every token that occurs, the deepest first.

    Args:
        batches: (B, T + 1) windows; the first T tokens of each are inputs and count.
        document_end: id that ends a document, at which attention stops; None: it spans documents.
    """
    was_training = model.training
    model.eval()
    device = model.embed_tokens.weight.device
    passes = torch.zeros(model.config.vocab_size, dtype=torch.long)
    occurrences = torch.zeros_like(passes)
    for batch in batches:
        inputs = batch[:, :-1].to(device)
        _, counts, _ = model.hidden_states(inputs, "threshold", document_end=document_end)
        ids = inputs.reshape(-1).cpu()
        passes.index_add_(0, ids, counts.cpu())
        occurrences += torch.bincount(ids, minlength=len(occurrences))
    model.train(was_training)
    seen = occurrences.nonzero()[:, 0].tolist()
    found = [
        TokenDepth(
            token_id=token,
            piece=tokenizer.decode([token]),
            mean_recursions=int(passes[token]) / int(occurrences[token]),
            occurrences=int(occurrences[token]),
        )
        for token in seen
    ]
    return sorted(found, key=lambda t: (-t.mean_recursions, -t.occurrences, t.token_id))


def extremes(
    tokens: Iterable[TokenDepth], num: int, min_occurrences: int
) -> tuple[list[TokenDepth], list[TokenDepth]]:
    """The `num` deepest and the `num` shallowest of the tokens with enough occurrences.

    Among equally deep ones the more frequent come first. No token is in both lists.
    """
    often = [token for token in tokens if token.occurrences >= min_occurrences]
    deep = sorted(often, key=lambda t: (-t.mean_recursions, -t.occurrences, t.token_id))
    num = min(num, (len(deep) + 1) // 2)  # with few tokens, half of them each
    deepest = deep[:num]
    taken = {token.token_id for token in deepest}
    rest = [token for token in deep if token.token_id not in taken]
    shallow = sorted(rest, key=lambda t: (t.mean_recursions, -t.occurrences, t.token_id))
    return deepest, shallow[:num]
