"""`calibrate`: routing thresholds that keep, on some text, the shares that capacities say."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mor.model.router import ExpertChoiceRouter
from mor.model.transformer import MoRModel

_PASS_ALL = -1e30  # a threshold that lets all pass, and survives JSON


@torch.no_grad()
def calibrate(
    model: MoRModel, windows: Sequence[Tensor], document_end: int | None = None
) -> tuple[float, ...]:
    """(R,) thresholds under which each depth keeps the share of tokens that its capacity says.

    tau_r is the (1 - c_r / c_{r-1}) quantile of the logits that router r gives to the tokens that
    depth r - 1 kept. Model and config are left as they were.

    Args:
        windows: batches of (B, T + 1) tokens, of training text: thresholds are parameters, so
            they must not be fitted to what the model is evaluated on.
        document_end: id at which attention stops; None: it spans documents.
    """
    assert isinstance(model.router, ExpertChoiceRouter)
    assert model.config.capacities is not None
    before, was_training = model.config.thresholds, model.training
    assert before is not None
    model.eval()
    device = model.embed_tokens.weight.device
    thresholds = list(before)
    previous = 1.0
    # One depth after the other: the thresholds of earlier depths, set in the model as they are
    # found, decide which tokens the next router sees.
    for depth, capacity in enumerate(model.config.capacities):
        keep = capacity / previous
        previous = capacity
        if keep == 1:
            thresholds[depth] = _PASS_ALL if depth else 0.0  # depth 0 with capacity 1 has no test
        else:
            ids = (window[:, :-1].to(device) for window in windows)
            passes = (
                model.hidden_states(i, "threshold", document_end=document_end)[2] for i in ids
            )
            logits = [p.decisions[depth] for p in passes if len(p.decisions) > depth]
            thresholds[depth] = _split_at(torch.cat(logits), keep) if logits else 0.0
        model.set_thresholds(tuple(thresholds))
    model.set_thresholds(before)  # the caller decides
    model.train(was_training)
    return tuple(thresholds)


def _split_at(logits: Tensor, keep: float) -> float:
    """The value half-way between the lowest kept logit and the next lower one.

    Args:
        logits: (N,) of all candidates.
        keep: share of them to keep; at least one is kept.
    """
    ordered = logits.double().sort(descending=True).values
    num = min(max(1, round(keep * len(ordered))), len(ordered))
    if num == len(ordered):
        return float(ordered[-1])
    return float((ordered[num - 1] + ordered[num]) / 2)
