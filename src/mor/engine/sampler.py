"""Choosing the next token of many rows at once, by the rules of `mor.model.sampling`.

Rows that draw or have penalties are computed in float64, as the reference generator does: rounding
then never makes another choice, and a row never feels its neighbours. Shape letters: N rows,
V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mor.model.sampling import MAX_LOGPROBS, SamplingParams

_CPU_ROWS = 8  # at a time: what they are turned into stays in the cache


@dataclass(frozen=True, kw_only=True)
class SamplingRow:
    """What the sampler must know about one row."""

    params: SamplingParams
    uniform: float
    """This token's random number in [0, 1); greedy rows do not look at it."""
    prompt: Sequence[int]
    """Token ids, for the penalties."""
    output: Sequence[int]
    """Token ids, for the penalties."""
    forbidden: Sequence[int]
    """Ids that must not come now."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What came out, one entry for each row."""

    tokens: list[int]
    logprobs: list[float]
    """Of the tokens, under the model: before penalties, temperature and cuts."""
    top_logprobs: list[dict[int, float]]
    """The likeliest tokens and their log-probabilities, as many as the row asks for."""


def sample(logits: Float[Tensor, "n v"], rows: Sequence[SamplingRow]) -> Sampled:
    """Choose one token for each row of logits; one transfer from the device to the host."""
    num = len(rows)
    assert num == len(logits)
    num_top = MAX_LOGPROBS if any(row.params.logprobs for row in rows) else 0
    step = _CPU_ROWS if logits.device.type == "cpu" else max(num, 1)
    parts = [
        _table(logits[start : start + step], rows[start : start + step], num_top)
        for start in range(0, max(num, 1), step)
    ]
    table = torch.cat(parts).tolist()
    return Sampled(
        tokens=[int(line[0]) for line in table],
        logprobs=[line[1] for line in table],
        top_logprobs=[
            _top(line[2:], row.params.logprobs) for line, row in zip(table, rows, strict=True)
        ],
    )


def score(
    logits: Float[Tensor, "n v"],
    tokens: Int[Tensor, " n"],
    num_top: int,
    best: tuple[list[int], list[float]] | None = None,
) -> tuple[list[float], list[dict[int, float]]]:
    """Log-probabilities of given tokens, and `num_top` of the likeliest ones in their places.

    Args:
        best: likeliest token of each row and its log-probability, if known; `num_top` is 0 or 1.
    """
    if best is not None:
        largest = logits.gather(1, tokens.new_tensor(best[0])[:, None])
        behind = (logits.gather(1, tokens[:, None]) - largest)[:, 0].tolist()
        pairs = list(zip(*best, strict=True))
        scores = [top + less for (_, top), less in zip(pairs, behind, strict=True)]
        return scores, [{token: top} for token, top in pairs]
    logprobs = _wide(logits).log_softmax(-1)
    columns = [logprobs.gather(1, tokens[:, None])]
    if num_top:
        likeliest = logprobs.topk(min(MAX_LOGPROBS, logits.shape[1]))
        columns += [likeliest.indices, likeliest.values]
    table = torch.cat([column.double() for column in columns], dim=1).tolist()
    return [line[0] for line in table], [_top(line[1:], num_top) for line in table]


def _table(
    logits: Float[Tensor, "n v"], rows: Sequence[SamplingRow], num_top: int
) -> Float[Tensor, "n columns"]:
    """In float64, which holds every id: token, its logprob, likeliest ids, their logprobs."""
    logits = _wide(logits.detach())
    logprobs = logits.log_softmax(-1)
    tokens = _argmax(logits)
    others = [number for number, row in enumerate(rows) if not is_plain(row)]
    if others:
        where = torch.tensor(others, device=logits.device)
        tokens[where] = _pick(logits[where].double(), [rows[number] for number in others])
    columns = [tokens[:, None], logprobs.gather(1, tokens[:, None])]
    if num_top:
        # The same number for all, so that a row's choice among equals is its own.
        likeliest = logprobs.topk(min(num_top, logits.shape[1]))
        columns += [likeliest.indices, likeliest.values]
    return torch.cat([column.double() for column in columns], dim=1)


def _wide(logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    return logits if logits.dtype == torch.float64 else logits.float()


def _top(line: list[float], num_top: int | None) -> dict[int, float]:
    half = len(line) // 2
    best = sorted(zip(line[:half], line[half:], strict=True), key=lambda pair: (-pair[1], pair[0]))
    return {int(token): logprob for token, logprob in best[: num_top or 0]}


def is_plain(row: SamplingRow) -> bool:
    """Whether a row takes the likeliest token of the logits as they are."""
    return row.params.temperature == 0 and not row.forbidden and not _has_penalties(row.params)


def _has_penalties(p: SamplingParams) -> bool:
    return (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1, 0, 0)


def _pick(logits: Float[Tensor, "n v"], rows: Sequence[SamplingRow]) -> Int[Tensor, " n"]:
    """(N,) tokens of rows that draw or have penalties; the float64 logits are overwritten."""
    _penalise(logits, rows)
    _forbid(logits, rows)
    tokens = _argmax(logits)
    drawing = [number for number, row in enumerate(rows) if row.params.temperature > 0]
    if drawing:
        where = torch.tensor(drawing, device=logits.device)
        best = tokens[where][:, None]
        tokens[where] = _draw(logits[where], best, [rows[number] for number in drawing])
    return tokens


def _draw(
    scores: Float[Tensor, "n v"], best: Int[Tensor, "n 1"], rows: Sequence[SamplingRow]
) -> Int[Tensor, " n"]:
    """(N,) tokens by inverse CDF over what the cuts leave; the scores are overwritten."""
    params = [row.params for row in rows]
    temperatures = _column([p.temperature for p in params], scores)
    weights = scores.sub_(scores.gather(1, best)).div_(temperatures).exp_()
    least = torch.zeros_like(temperatures)  # each row's smallest weight that is kept
    if some := [i for i, p in enumerate(params) if 0 < p.top_k < weights.shape[1]]:
        least[some] = _kth(weights[some], [params[i].top_k for i in some])
    if some := [i for i, p in enumerate(params) if p.top_p < 1]:
        left = weights[some]
        left = torch.where(left < least[some], 0.0, left)
        nucleus = _nucleus(left, _column([params[i].top_p for i in some], weights))
        least[some] = torch.maximum(least[some], nucleus)
    if any(p.top_k or p.top_p < 1 or p.min_p for p in params):
        shares = _column([p.min_p for p in params], weights)  # of the likeliest token's weight, 1
        weights = torch.where(weights < torch.maximum(least, shares), 0.0, weights)
    sums = weights.cumsum(-1)
    reached = _column([row.uniform for row in rows], sums) * sums[:, -1:]
    drawn = torch.searchsorted(sums, reached, right=True).clamp_(max=sums.shape[1] - 1)
    # On a GPU the last bit of a sum may fall again: what was cut must not come even then.
    return torch.where(weights.gather(1, drawn) > 0, drawn, best)[:, 0]


def _argmax(logits: Float[Tensor, "n v"]) -> Int[Tensor, " n"]:
    """(N,) the first of the largest; on a CPU numpy's takes a tenth of the time of torch's."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def _column(values: Sequence[float], like: Tensor) -> Float[Tensor, "n 1"]:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _penalise(logits: Float[Tensor, "n v"], rows: Sequence[SamplingRow]) -> None:
    numbers: list[int] = []
    ids: list[int] = []
    factors: list[float] = []
    taken: list[float] = []
    for number, row in enumerate(rows):
        p = row.params
        if not _has_penalties(p):
            continue
        counts = Counter(row.output)
        seen = {*row.prompt, *counts}
        ids += seen
        numbers += [number] * len(seen)
        factors += [p.repetition_penalty] * len(seen)
        taken += [
            p.presence_penalty + p.frequency_penalty * counts[t] if t in counts else 0.0
            for t in seen
        ]
    if not ids:
        return
    where = torch.tensor([numbers, ids], device=logits.device).unbind(0)
    factor, less = (_column(values, logits)[:, 0] for values in (factors, taken))
    old = logits[where]
    logits[where] = torch.where(old > 0, old / factor, old * factor) - less


def _forbid(logits: Float[Tensor, "n v"], rows: Sequence[SamplingRow]) -> None:
    pairs = [(number, token) for number, row in enumerate(rows) for token in row.forbidden]
    if pairs:
        logits[torch.tensor(pairs, device=logits.device).unbind(1)] = -torch.inf


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
        return _column([_reaching(w, *b) for w, b in zip(weights, bounds, strict=True)], weights)
    ordered = weights.sort(descending=True).values
    num_less = (ordered.cumsum(-1) < enough).sum(-1, keepdim=True)
    return ordered.gather(1, num_less.clamp(max=ordered.shape[1] - 1))


def _reaching(weights: Float[Tensor, " v"], enough: float, small: float) -> float:
    """The weight at which the largest ones sum up to enough; numpy sorts faster than torch."""
    values = weights.numpy()
    ordered = np.sort(values[~(values < small)])[::-1]  # with NaN, so that there is one
    num_less = int(np.searchsorted(ordered.cumsum(), enough))
    return float(ordered[min(num_less, len(ordered) - 1)])
