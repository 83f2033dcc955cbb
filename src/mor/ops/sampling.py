"""Choosing tokens by their logits: the likeliest, samples of a truncated distribution, scores.

Shape letters: N rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class TruncationParams(Protocol):
    """How a row is sampled: what is read here of `mor.model.sampling.SamplingParams`."""

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
    maximum: int,
    best: tuple[list[int], list[float]] | None = None,
) -> tuple[list[float], list[dict[int, float]]]:
    """Log-probabilities of given tokens, and `num_top` of the likeliest ones in their places.

    Args:
        maximum: likely tokens that are looked for, whatever `num_top` is, so that a row's choice
            among equals is its own.
        best: likeliest token of each row and its log-probability, if known; `num_top` is 0 or 1.
    """
    if best is not None:
        largest = logits.gather(1, tokens.new_tensor(best[0])[:, None])
        # log p(token) = log p(best) + (logit(token) - logit(best)): no softmax is needed.
        behind = (logits.gather(1, tokens[:, None]) - largest)[:, 0].tolist()
        pairs = list(zip(*best, strict=True))
        scores = [top + less for (_, top), less in zip(pairs, behind, strict=True)]
        return scores, [{token: top} for token, top in pairs]
    logprobs = upcast(logits).log_softmax(-1)
    columns = [logprobs.gather(1, tokens[:, None])]
    if num_top:
        likeliest = logprobs.topk(min(maximum, logits.shape[1]))
        columns += [likeliest.indices, likeliest.values]
    # One transfer from the device: ids as float64 are exact.
    table = torch.cat([column.double() for column in columns], dim=1).tolist()
    return [line[0] for line in table], [top_logprobs(line[1:], num_top) for line in table]


def upcast(logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """Logits in float32; float64 ones stay."""
    return logits if logits.dtype == torch.float64 else logits.float()


def top_logprobs(line: list[float], num_top: int | None) -> dict[int, float]:
    """Id and log-probability of the first `num_top` tokens; likeliest first, equals by id.

    Args:
        line: ids, then as many log-probabilities.
    """
    half = len(line) // 2
    best = sorted(zip(line[:half], line[half:], strict=True), key=lambda pair: (-pair[1], pair[0]))
    return {int(token): logprob for token, logprob in best[: num_top or 0]}


@dataclass(frozen=True, kw_only=True)
class SamplingTensors:
    """How some rows are sampled, on the device: nothing of it is read back or sent anew."""

    temperature: Float[Tensor, "n 1"]
    min_p: Float[Tensor, "n 1"]
    top_k: tuple[Int[Tensor, " k"], Int[Tensor, "k 1"], int] | None
    """Rows that keep their likeliest, how many each, and the most; None: there are none."""
    top_p: tuple[Int[Tensor, " p"], Float[Tensor, "p 1"]] | None
    """Rows that keep a share of the weight, and the shares; None: there are none."""
    cuts: bool
    """Whether any row is truncated at all."""

    @classmethod
    def of(
        cls, cuts: Sequence[TruncationParams], vocabulary: int, like: Tensor
    ) -> "SamplingTensors":
        """For logits of `vocabulary` columns, of the dtype and on the device of `like`."""

        def ints(values: list[int]) -> Tensor:
            return torch.tensor(values, device=like.device)

        few = [i for i, c in enumerate(cuts) if 0 < c.top_k < vocabulary]
        ks = [cuts[i].top_k for i in few]
        nuclei = [i for i, c in enumerate(cuts) if c.top_p < 1]
        return cls(
            temperature=as_column([c.temperature for c in cuts], like),
            min_p=as_column([c.min_p for c in cuts], like),
            top_k=(ints(few), ints(ks)[:, None], max(ks)) if few else None,
            top_p=(ints(nuclei), as_column([cuts[i].top_p for i in nuclei], like))
            if nuclei
            else None,
            cuts=any(c.top_k or c.top_p < 1 or c.min_p for c in cuts),
        )


def sample(
    scores: Float[Tensor, "n v"],
    best: Int[Tensor, "n 1"],
    uniforms: Float[Tensor, "n 1"],
    draws: SamplingTensors,
) -> Int[Tensor, " n"]:
    """(N,) tokens by inverse CDF over what the cuts leave; the scores are overwritten.

    Args:
        best: the likeliest token of each row.
        uniforms: each row's random number in [0, 1).
    """
    # Unnormalized probabilities, the likeliest token's being 1: inverse CDF needs no more.
    weights = scores.sub_(scores.gather(1, best)).div_(draws.temperature).exp_()
    minimum = torch.zeros_like(draws.temperature)  # each row's smallest weight that is kept
    if draws.top_k is not None:
        some, ks, maximum = draws.top_k
        # All rows take the largest k; each reads off its own k-th weight.
        minimum[some] = weights[some].topk(maximum).values.gather(1, ks - 1)
    if draws.top_p is not None:
        some, shares = draws.top_p
        # top_p is a share of what top_k left.
        left = weights[some]
        left = torch.where(left < minimum[some], 0.0, left)
        minimum[some] = torch.maximum(minimum[some], _nucleus(left, shares))
    if draws.cuts:  # min_p: a share of the likeliest token's weight, which is 1
        weights = torch.where(weights < torch.maximum(minimum, draws.min_p), 0.0, weights)
    sums = weights.cumsum(-1)
    reached = uniforms * sums[:, -1:]
    drawn = torch.searchsorted(sums, reached, right=True).clamp_(max=sums.shape[1] - 1)
    # On a GPU the last bit of a sum may fall again: what was cut must not come even then.
    return torch.where(weights.gather(1, drawn) > 0, drawn, best)[:, 0]


def argmax(logits: Float[Tensor, "n v"]) -> Int[Tensor, " n"]:
    """(N,) the first of the largest; on a CPU numpy's takes a tenth of the time of torch's."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def as_column(values: Sequence[float], like: Tensor) -> Float[Tensor, "n 1"]:
    """Numbers as a column, where another tensor is."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _nucleus(weights: Float[Tensor, "n v"], top_p: Float[Tensor, "n 1"]) -> Float[Tensor, "n 1"]:
    """(N, 1) each row's smallest weight that top_p keeps."""
    total = weights.cumsum(-1)[:, -1:]
    enough = top_p * total
    if weights.device.type == "cpu":
        # Weights below a V-th of what may be cut are cut, even if all are; half, to be safe.
        small = (total - enough) / (2 * weights.shape[1])
        bounds = torch.cat((enough, small), dim=1).tolist()
        return as_column([_reaching(w, *b) for w, b in zip(weights, bounds, strict=True)], weights)
    # Sort, and count the tokens before the one at which the sum is enough: that one is kept.
    ordered = weights.sort(descending=True).values
    num_less = (ordered.cumsum(-1) < enough).sum(-1, keepdim=True)
    return ordered.gather(1, num_less.clamp(max=ordered.shape[1] - 1))


def _reaching(weights: Float[Tensor, " v"], enough: float, small: float) -> float:
    """The weight at which the largest ones sum up to enough; numpy sorts faster than torch."""
    values = weights.numpy()
    ordered = np.sort(values[~(values < small)])[::-1]  # with NaN, so that there is one
    num_less = int(np.searchsorted(ordered.cumsum(), enough))
    return float(ordered[min(num_less, len(ordered) - 1)])
