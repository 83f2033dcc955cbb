"""Choosing tokens by their logits: the likeliest, draws from what cuts leave, scores.

Shape letters: N rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Cuts(Protocol):
    """How a row is drawn, see `mor.model.sampling.SamplingParams`."""

    @property
    def temperature(self) -> float:
        """Above 0."""
        ...

    @property
    def top_k(self) -> int:
        """0 keeps all."""
        ...

    @property
    def top_p(self) -> float:
        """1 keeps all."""
        ...

    @property
    def min_p(self) -> float:
        """0 keeps all."""
        ...


def score(
    logits: Float[Tensor, "n v"],
    tokens: Int[Tensor, " n"],
    num_top: int,
    most: int,
    best: tuple[list[int], list[float]] | None = None,
) -> tuple[list[float], list[dict[int, float]]]:
    """Log-probabilities of given tokens, and `num_top` of the likeliest ones in their places.

    Args:
        most: likely tokens that are looked for, whatever `num_top` is, so that a row's choice
            among equals is its own.
        best: likeliest token of each row and its log-probability, if known; `num_top` is 0 or 1.
    """
    if best is not None:
        largest = logits.gather(1, tokens.new_tensor(best[0])[:, None])
        behind = (logits.gather(1, tokens[:, None]) - largest)[:, 0].tolist()
        pairs = list(zip(*best, strict=True))
        scores = [top + less for (_, top), less in zip(pairs, behind, strict=True)]
        return scores, [{token: top} for token, top in pairs]
    logprobs = wide(logits).log_softmax(-1)
    columns = [logprobs.gather(1, tokens[:, None])]
    if num_top:
        likeliest = logprobs.topk(min(most, logits.shape[1]))
        columns += [likeliest.indices, likeliest.values]
    table = torch.cat([column.double() for column in columns], dim=1).tolist()
    return [line[0] for line in table], [ranked(line[1:], num_top) for line in table]


def wide(logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """Logits in float32, or in float64 if they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def ranked(line: list[float], num_top: int | None) -> dict[int, float]:
    """The first entries of a line of ids, then log-probabilities; likeliest first, then by id."""
    half = len(line) // 2
    best = sorted(zip(line[:half], line[half:], strict=True), key=lambda pair: (-pair[1], pair[0]))
    return {int(token): logprob for token, logprob in best[: num_top or 0]}


def draw(
    scores: Float[Tensor, "n v"],
    best: Int[Tensor, "n 1"],
    uniforms: Sequence[float],
    cuts: Sequence[Cuts],
) -> Int[Tensor, " n"]:
    """(N,) tokens by inverse CDF over what the cuts leave; the scores are overwritten.

    Args:
        best: the likeliest token of each row.
        uniforms: each row's random number in [0, 1).
    """
    temperatures = column([c.temperature for c in cuts], scores)
    weights = scores.sub_(scores.gather(1, best)).div_(temperatures).exp_()
    least = torch.zeros_like(temperatures)  # each row's smallest weight that is kept
    if some := [i for i, c in enumerate(cuts) if 0 < c.top_k < weights.shape[1]]:
        least[some] = _kth(weights[some], [cuts[i].top_k for i in some])
    if some := [i for i, c in enumerate(cuts) if c.top_p < 1]:
        left = weights[some]
        left = torch.where(left < least[some], 0.0, left)
        nucleus = _nucleus(left, column([cuts[i].top_p for i in some], weights))
        least[some] = torch.maximum(least[some], nucleus)
    if any(c.top_k or c.top_p < 1 or c.min_p for c in cuts):
        shares = column([c.min_p for c in cuts], weights)  # of the likeliest token's weight, 1
        weights = torch.where(weights < torch.maximum(least, shares), 0.0, weights)
    sums = weights.cumsum(-1)
    reached = column(uniforms, sums) * sums[:, -1:]
    drawn = torch.searchsorted(sums, reached, right=True).clamp_(max=sums.shape[1] - 1)
    # On a GPU the last bit of a sum may fall again: what was cut must not come even then.
    return torch.where(weights.gather(1, drawn) > 0, drawn, best)[:, 0]


def argmax(logits: Float[Tensor, "n v"]) -> Int[Tensor, " n"]:
    """(N,) the first of the largest; on a CPU numpy's takes a tenth of the time of torch's."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def column(values: Sequence[float], like: Tensor) -> Float[Tensor, "n 1"]:
    """Numbers as a column, where another tensor is."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _kth(weights: Float[Tensor, "n v"], ks: Sequence[int]) -> Float[Tensor, "n 1"]:
    """(N, 1) each row's k-th largest weight."""
    ordered = weights.topk(max(ks)).values
    return ordered.gather(1, torch.tensor(ks, device=weights.device)[:, None] - 1)


def _nucleus(weights: Float[Tensor, "n v"], top_p: Float[Tensor, "n 1"]) -> Float[Tensor, "n 1"]:
    """(N, 1) each row's smallest weight that top_p keeps."""
    total = weights.cumsum(-1)[:, -1:]
    enough = top_p * total
    if weights.device.type == "cpu":
        # Weights below a V-th of what may be cut are cut, even if all are; half, to be safe.
        small = (total - enough) / (2 * weights.shape[1])
        bounds = torch.cat((enough, small), dim=1).tolist()
        return column([_reaching(w, *b) for w, b in zip(weights, bounds, strict=True)], weights)
    ordered = weights.sort(descending=True).values
    num_less = (ordered.cumsum(-1) < enough).sum(-1, keepdim=True)
    return ordered.gather(1, num_less.clamp(max=ordered.shape[1] - 1))


def _reaching(weights: Float[Tensor, " v"], enough: float, small: float) -> float:
    """The weight at which the largest ones sum up to enough; numpy sorts faster than torch."""
    values = weights.numpy()
    ordered = np.sort(values[~(values < small)])[::-1]  # with NaN, so that there is one
    num_less = int(np.searchsorted(ordered.cumsum(), enough))
    return float(ordered[min(num_less, len(ordered) - 1)])
