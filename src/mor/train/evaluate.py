"""`evaluate`: a model's loss under both selection rules, its depths, and how its routers agree."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mor.errors import DataError
from mor.model.router import ExpertChoiceRouter, Selection
from mor.model.transformer import MoRModel
from mor.ops.cross_entropy import token_nll


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` measures; losses are in nats per token."""

    nll_topk: float
    """With `topk` selection, which looks ahead in the sequence: what papers report."""
    nll_threshold: float
    """With `threshold` selection, which is causal: what generation gets."""
    depth_histogram: tuple[float, ...]
    """(R + 1,) share of tokens by recursion count 0..R, with `threshold` selection."""
    router_accuracy: float | None
    """Share of decisions on which both rules agree; None without expert choice."""
    dead_share: float | None
    """Share of the window's T positions that the deepest recursion selects in no window, with
    `topk` selection; None without a learned expert-choice router."""
    tokens: int
    """Tokens predicted."""

    @property
    def causal_gap(self) -> float:
        """What causal selection costs: `nll_threshold - nll_topk`."""
        return self.nll_threshold - self.nll_topk

    def as_dict(self) -> dict[str, Any]:
        """The fields and the gap, by their names in `metrics.jsonl`."""
        return {**asdict(self), "nll_gap": self.causal_gap}


@torch.no_grad()
def evaluate(
    model: MoRModel, windows: Iterable[Tensor], document_end: int | None = None
) -> Evaluation:
    """Measure a model on batches of windows; its mode and random numbers stay as they are.

    Args:
        windows: (B, T + 1) tokens each: inputs `[:, :-1]`, targets `[:, 1:]`.
        document_end: id at which attention stops; None: it spans documents.

    Raises:
        DataError: there are no windows.
    """
    was_training = model.training
    model.eval()
    two_rules = isinstance(model.router, ExpertChoiceRouter)
    sums = {"topk": 0.0, "threshold": 0.0}
    # Tokens by recursion count, (R + 1,).
    histogram = torch.zeros(model.config.num_recursions + 1, dtype=torch.long)
    agreements: list[Tensor] = []
    reached: Tensor | None = None  # (T,) whether the deepest recursion has selected a position
    tokens = 0
    device = model.embed_tokens.weight.device
    for batch in windows:
        ids, targets = batch[:, :-1].to(device), batch[:, 1:].to(device)
        nll, counts, _ = _nll(model, ids, targets, "threshold", document_end)
        sums["threshold"] += nll
        histogram += torch.bincount(counts.cpu(), minlength=len(histogram))
        # Without expert choice both rules are the same, and so are their losses.
        if two_rules:
            nll, counts, correct = _nll(model, ids, targets, "topk", document_end)
            agreements += correct
            deepest = (counts == model.config.num_recursions).view(ids.shape).any(0)
            reached = deepest if reached is None else reached | deepest
        sums["topk"] += nll
        tokens += targets.numel()
    model.train(was_training)
    if tokens == 0:
        raise DataError("there is nothing to evaluate on: no window of validation text.")
    learned = model.config.router_type != "random"
    dead = 1 - float(reached.float().mean()) if reached is not None and learned else None
    return Evaluation(
        nll_topk=sums["topk"] / tokens,
        nll_threshold=sums["threshold"] / tokens,
        depth_histogram=tuple((histogram / histogram.sum()).tolist()),
        router_accuracy=float(torch.stack(agreements).mean()) if agreements else None,
        dead_share=dead,
        tokens=tokens,
    )


def _nll(
    model: MoRModel, ids: Tensor, targets: Tensor, selection: Selection, document_end: int | None
) -> tuple[float, Tensor, list[Tensor]]:
    """Summed NLL of a batch in nats, (B * T,) recursion counts, shares of agreeing decisions."""
    hidden, counts, record = model.hidden_states(ids, selection, document_end=document_end)
    nll = token_nll(model.norm(hidden), model.lm_head.weight, targets.reshape(-1))
    return float(nll.double().sum()), counts, record.correct
