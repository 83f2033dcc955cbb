"""Samples the next token of each row of logits, by the rules of `mor.model.sampling`.

- `sample`: any rows; penalties and forbidden tokens are prepared on the host for each step.
- `DeviceSampler`: rows whose rules stay the same from token to token, for multi-step decoding.

Rows that draw or have penalties are computed in float64, as in the reference generator: rounding
then never changes a choice, and a row's token does not depend on its neighbors.

Shape letters: N rows, V vocabulary.
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

_CPU_ROWS = 8  # rows at a time on a CPU: their float64 logits and log-probabilities stay in cache


class DeviceSampler:
    """Samples rows whose rules stay the same from token to token; nothing waits for the device.

    Args:
        params: of each row, which `supports` must allow; rows after the last one are greedy.
        vocabulary: V.
    """

    def __init__(
        self, params: Sequence[SamplingParams], vocabulary: int, device: torch.device
    ) -> None:
        drawing = [row for row, p in enumerate(params) if p.temperature > 0]
        self._drawing_rows = torch.tensor(drawing, device=device)
        # Tells `SamplingTensors` dtype and device.
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
            rows = self._drawing_rows
            best = tokens[rows][:, None]
            scores = logits[rows].double()
            tokens[rows] = sampling.sample(scores, best, uniforms[rows][:, None], self._draws)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    @staticmethod
    def supports(sequence: SequenceState) -> bool:
        """Whether a sequence's next tokens need nothing from the host between two of them.

        Penalties look back at the tokens so far, likely tokens are listed for each, and tokens that
        are forbidden until `min_tokens` are allowed afterwards.
        """
        return not (
            sequence.params.has_penalties
            or sequence.params.logprobs
            or sequence.num_output_tokens < sequence.params.min_tokens
        )


def sample(logits: Float[Tensor, "n v"], rows: Sequence[SamplingInput]) -> SamplerOutput:
    """One token for each row of logits; one transfer from the device to the host.

    Args:
        rows: what is asked of each row.
    """
    num = len(rows)
    assert num == len(logits)
    num_top = MAX_LOGPROBS if any(row.params.logprobs for row in rows) else 0
    step = _CPU_ROWS if logits.device.type == "cpu" else max(num, 1)
    # At least one part, so that no rows give an empty table of the right width.
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
    """(N, 2 + 2 * num_top) token id, its log-probability, likeliest ids, their log-probabilities.

    In float64, which holds every id exactly. `num_top` is capped by V.
    """
    logits = upcast(logits.detach())
    logprobs = logits.log_softmax(-1)
    tokens = argmax(logits)
    others = [number for number, row in enumerate(rows) if not is_greedy(row)]
    if others:
        where = torch.tensor(others, device=logits.device)
        # A copy: log-probabilities are those of the model, before penalties.
        tokens[where] = _pick(logits[where].double(), [rows[number] for number in others])
    columns = [tokens[:, None], logprobs.gather(1, tokens[:, None])]
    if num_top:
        # The same number for all rows: which of equal tokens `topk` lists may depend on it, and
        # must not depend on what other rows ask for.
        likeliest = logprobs.topk(min(num_top, logits.shape[1]))
        columns += [likeliest.indices, likeliest.values]
    return torch.cat([column.double() for column in columns], dim=1)


def is_greedy(row: SamplingInput) -> bool:
    """Whether a row takes the likeliest token of the logits as the model gives them."""
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
        params = [rows[number].params for number in drawing]
        draws = SamplingTensors.of(params, logits.shape[1], logits)
        tokens[where] = sampling.sample(logits[where], best, uniforms, draws)
    return tokens


def _penalize(logits: Float[Tensor, "n v"], rows: Sequence[SamplingInput]) -> None:
    """Apply repetition, presence and frequency penalties to the logits, in place."""
    # One entry for each (row, token) that is penalized, over all rows: one gather and one scatter.
    numbers: list[int] = []
    ids: list[int] = []
    factors: list[float] = []
    offsets: list[float] = []
    for number, row in enumerate(rows):
        p = row.params
        if not p.has_penalties:
            continue
        # Repetition counts prompt and output, presence and frequency the output only.
        counts = Counter(row.output)
        seen = {*row.prompt, *counts}
        ids += seen
        numbers += [number] * len(seen)
        factors += [p.repetition_penalty] * len(seen)
        offsets += [
            p.presence_penalty + p.frequency_penalty * counts[t] if t in counts else 0.0
            for t in seen
        ]
    if not ids:
        return
    where = torch.tensor([numbers, ids], device=logits.device).unbind(0)
    factor = as_column(factors, logits)[:, 0]
    offset = as_column(offsets, logits)[:, 0]
    old = logits[where]
    # A factor above 1 lowers a logit of either sign (Keskar et al., 2019, as all libraries do it).
    logits[where] = torch.where(old > 0, old / factor, old * factor) - offset


def _forbid(logits: Float[Tensor, "n v"], rows: Sequence[SamplingInput]) -> None:
    """Set the logits of forbidden tokens to -inf, in place."""
    pairs = [(number, token) for number, row in enumerate(rows) for token in row.forbidden]
    if pairs:
        logits[torch.tensor(pairs, device=logits.device).unbind(1)] = -torch.inf
