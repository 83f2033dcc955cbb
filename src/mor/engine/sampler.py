"""Choosing the next token of many rows at once, by the rules of `mor.model.sampling`.

Rows that draw or have penalties are computed in float64, as the reference generator does: rounding
then never makes another choice, and a row never feels its neighbors. Shape letters: N rows,
V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mor.engine.plan import SamplerOutput, SamplingInput
from mor.engine.request import SequenceState
from mor.model.sampling import MAX_LOGPROBS, SamplingParams
from mor.ops import sampling
from mor.ops.sampling import SamplingTensors, argmax, as_column, top_logprobs, upcast

_CPU_ROWS = 8  # at a time: what they are turned into stays in the cache


class DeviceSampler:
    """Rows whose rules stay what they are from token to token; nothing waits for the device.

    Args:
        params: of each row; see `takes`.
        vocabulary: V.
    """

    def __init__(
        self, params: Sequence[SamplingParams], vocabulary: int, device: torch.device
    ) -> None:
        drawing = [number for number, p in enumerate(params) if p.temperature > 0]
        self._where = torch.tensor(drawing, device=device)
        like = torch.empty(0, dtype=torch.float64, device=device)
        self._draws = (
            SamplingTensors.of([params[i] for i in drawing], vocabulary, like) if drawing else None
        )

    def __call__(
        self, logits: Float[Tensor, "n v"], uniforms: Float[Tensor, " n"]
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """(N,) tokens and their log-probabilities, as `sample` would give them."""
        logits = upcast(logits.detach())
        tokens = argmax(logits)
        if self._draws is not None:
            best, where = tokens[self._where][:, None], self._where
            scores = logits[where].double()
            tokens[where] = sampling.sample(scores, best, uniforms[where][:, None], self._draws)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    @staticmethod
    def supports(sequence: SequenceState) -> bool:
        """Whether a sequence's further tokens can be sampled so."""
        return not (
            sequence.params.has_penalties
            or sequence.params.logprobs
            or len(sequence.output_token_ids) < sequence.params.min_tokens
        )


def sample(logits: Float[Tensor, "n v"], rows: Sequence[SamplingInput]) -> SamplerOutput:
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
    return SamplerOutput(
        token_ids=tuple(int(line[0]) for line in table),
        logprobs=tuple(line[1] for line in table),
        top_logprobs=tuple(
            top_logprobs(line[2:], row.params.logprobs)
            for line, row in zip(table, rows, strict=True)
        ),
    )


def _table(
    logits: Float[Tensor, "n v"], rows: Sequence[SamplingInput], num_top: int
) -> Float[Tensor, "n columns"]:
    """In float64, which holds every id: token, its logprob, likeliest ids, their logprobs."""
    logits = upcast(logits.detach())
    logprobs = logits.log_softmax(-1)
    tokens = argmax(logits)
    others = [number for number, row in enumerate(rows) if not is_greedy(row)]
    if others:
        where = torch.tensor(others, device=logits.device)
        tokens[where] = _pick(logits[where].double(), [rows[number] for number in others])
    columns = [tokens[:, None], logprobs.gather(1, tokens[:, None])]
    if num_top:
        # The same number for all, so that a row's choice among equals is its own.
        likeliest = logprobs.topk(min(num_top, logits.shape[1]))
        columns += [likeliest.indices, likeliest.values]
    return torch.cat([column.double() for column in columns], dim=1)


def is_greedy(row: SamplingInput) -> bool:
    """Whether a row takes the likeliest token of the logits as they are."""
    return row.params.temperature == 0 and not row.forbidden and not row.params.has_penalties


def _pick(logits: Float[Tensor, "n v"], rows: Sequence[SamplingInput]) -> Int[Tensor, " n"]:
    """(N,) tokens of rows that draw or have penalties; the float64 logits are overwritten."""
    _penalize(logits, rows)
    _forbid(logits, rows)
    tokens = argmax(logits)
    drawing = [number for number, row in enumerate(rows) if row.params.temperature > 0]
    if drawing:
        where = torch.tensor(drawing, device=logits.device)
        best = tokens[where][:, None]
        uniforms = as_column([rows[number].uniform for number in drawing], logits)
        draws = SamplingTensors.of(
            [rows[number].params for number in drawing], logits.shape[1], logits
        )
        tokens[where] = sampling.sample(logits[where], best, uniforms, draws)
    return tokens


def _penalize(logits: Float[Tensor, "n v"], rows: Sequence[SamplingInput]) -> None:
    numbers: list[int] = []
    ids: list[int] = []
    factors: list[float] = []
    taken: list[float] = []
    for number, row in enumerate(rows):
        p = row.params
        if not p.has_penalties:
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
    factor, less = (as_column(values, logits)[:, 0] for values in (factors, taken))
    old = logits[where]
    logits[where] = torch.where(old > 0, old / factor, old * factor) - less


def _forbid(logits: Float[Tensor, "n v"], rows: Sequence[SamplingInput]) -> None:
    pairs = [(number, token) for number, row in enumerate(rows) for token in row.forbidden]
    if pairs:
        logits[torch.tensor(pairs, device=logits.device).unbind(1)] = -torch.inf
