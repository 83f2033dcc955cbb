"""What a run measures: loss under both selection rules, depths, routers; kept as JSON lines."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor.errors import DataError
from mor.io.storage import storage_error, write_file
from mor.model.mor import MoRModel
from mor.model.router import ExpertChoice, Selection
from mor.ops.cross_entropy import token_nll

_EVERYBODY = -1e30  # a threshold that lets all pass, and survives JSON


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Loss of a model on some windows, in nats per token, the way the paper and a user see it."""

    nll_topk: float
    """Selecting the best of the whole sequence, which looks ahead: what papers report."""
    nll_threshold: float
    """Selecting by thresholds, causally: what a user gets."""
    depth_histogram: tuple[float, ...]
    """(R + 1,) share of tokens by recursion count 0..R, under `threshold`."""
    router_accuracy: float | None
    """Share of decisions on which both rules agree; None without expert choice."""
    dead_share: float | None
    """Share of positions that the deepest recursion never selects; None where no learned router
    selects."""
    tokens: int

    @property
    def gap(self) -> float:
        """What causality costs."""
        return self.nll_threshold - self.nll_topk

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "nll_gap": self.gap}


@torch.no_grad()
def evaluate(
    model: MoRModel, windows: Iterable[Tensor], document_end: int | None = None
) -> Evaluation:
    """Evaluate on batches of windows, each (B, T + 1): inputs `[:, :-1]`, targets `[:, 1:]`.

    Args:
        document_end: id at which attention stops; None: it spans documents.

    Raises:
        DataError: there are no windows.
    """
    was_training = model.training
    model.eval()
    two_rules = isinstance(model.router, ExpertChoice)
    sums = {"topk": 0.0, "threshold": 0.0}
    histogram = torch.zeros(model.config.num_recursions + 1, dtype=torch.long)
    agreements: list[Tensor] = []
    reached: Tensor | None = None  # positions that the deepest recursion selected at least once
    tokens = 0
    device = model.embed_tokens.weight.device
    for batch in windows:
        ids, targets = batch[:, :-1].to(device), batch[:, 1:].to(device)
        nll, counts, _ = _nll(model, ids, targets, "threshold", document_end)
        sums["threshold"] += nll
        histogram += torch.bincount(counts.cpu(), minlength=len(histogram))
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
    hidden, counts, record = model.hidden_states(ids, selection, document_end=document_end)
    nll = token_nll(model.norm(hidden), model.lm_head.weight, targets.reshape(-1))
    return float(nll.double().sum()), counts, record.correct


@torch.no_grad()
def calibrate(
    model: MoRModel, windows: Sequence[Tensor], document_end: int | None = None
) -> tuple[float, ...]:
    """Thresholds under which each depth keeps the share of tokens that its capacity says.

    Depth by depth, since who survives the earlier depths decides what the next router sees: tau_r
    is the (1 - c_r / c_{r-1}) quantile of the logits of depth r - 1's survivors.

    Args:
        windows: batches of (B, T + 1) tokens, best of training text: thresholds are parameters.
        document_end: id at which attention stops; None: it spans documents.

    Returns:
        (R,) thresholds, not yet set in the model.
    """
    assert isinstance(model.router, ExpertChoice)
    assert model.config.capacities is not None
    before, was_training = model.config.thresholds, model.training
    assert before is not None
    model.eval()
    device = model.embed_tokens.weight.device
    thresholds = list(before)
    previous = 1.0
    for depth, capacity in enumerate(model.config.capacities):
        keep = capacity / previous
        previous = capacity
        if keep == 1:
            thresholds[depth] = _EVERYBODY if depth else 0.0
        else:
            ids = (window[:, :-1].to(device) for window in windows)
            passes = (
                model.hidden_states(i, "threshold", document_end=document_end)[2] for i in ids
            )
            logits = [p.decisions[depth] for p in passes if len(p.decisions) > depth]
            thresholds[depth] = _split_at(torch.cat(logits), keep) if logits else 0.0
        model.set_thresholds(tuple(thresholds))
    model.set_thresholds(before)
    model.train(was_training)
    return tuple(thresholds)


def _split_at(logits: Tensor, keep: float) -> float:
    """The value half-way between the last logit that stays and the first that goes."""
    ordered = logits.double().sort(descending=True).values
    num = min(max(1, round(keep * len(ordered))), len(ordered))
    if num == len(ordered):
        return float(ordered[-1])
    return float((ordered[num - 1] + ordered[num]) / 2)


class MetricsFile:
    """`metrics.jsonl` of a run: one object a line, with at least `step`, `loss` and `tokens`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            CapacityError: the disk is full.
        """
        clean = {k: None if _broken(v) else v for k, v in row.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
        except OSError as error:
            raise storage_error(self.path, error) from error

    def rows(self) -> list[dict[str, Any]]:
        """All whole lines; a last line that a killed run left half-written is passed over."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def cut_after(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run writes again."""
        if not self.path.exists():
            return
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        try:
            write_file(self.path, "".join(kept).encode())
        except OSError as error:
            raise storage_error(self.path, error) from error


def _broken(value: Any) -> bool:
    """NaN and infinity are not JSON."""
    return isinstance(value, float) and not math.isfinite(value)
