"""The optimizer, and schedules as pure functions of the step."""

from collections.abc import Callable
from typing import Any

import torch

from mor.model.transformer import MoRModel
from mor.train.config import TrainConfig


def build_optimizer(model: MoRModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon for the layers' matrices and AdamW for the rest; tied parameters count once.

    Matrices decay, embedding and head by their own strength, norms not at all. Each group's `peak`
    is its learning rate as a share of `lr`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    ends = {id(model.embed_tokens.weight), id(model.lm_head.weight)}
    layers = {id(p) for part in (model.prelude, model.block, model.coda) for p in part.parameters()}
    matrices = [p for p in trained if p.ndim >= 2 and id(p) not in ends]
    decay, end_decay = config.weight_decay, config.embedding_weight_decay
    # Not the deltas of depths, three axes: Muon would make all their directions equally strong.
    whole = [p for p in matrices if p.ndim == 2 and id(p) in layers]
    hidden = whole if config.optimizer == "muon" else []
    by_muon = {id(p) for p in hidden}
    groups = [
        {"params": [p for p in matrices if id(p) not in by_muon], "weight_decay": decay},
        {
            "params": [p for p in trained if id(p) in ends],
            "weight_decay": decay if end_decay is None else end_decay,
        },
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [group | {"peak": 1.0} for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
    if not hidden:
        return allocate_optimizer_state(adamw)
    muon_lr = config.lr if config.muon_lr is None else config.muon_lr
    muon = torch.optim.Muon(
        [{"params": hidden, "peak": muon_lr / config.lr}],
        lr=muon_lr,
        weight_decay=decay,
        momentum=config.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return allocate_optimizer_state(OptimizersContainer(muon, adamw))


def allocate_optimizer_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer of AdamW's and Muon's groups, with room for all that it will keep.

    Left to the first step, moments come to lie between gradients. What these leave behind is too
    small for any activation, so a CPU process would hold their size once more for good.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "momentum" in group:
                optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}
            else:
                step = torch.zeros((), device=p.device)
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": step, **moments}
    return optimizer


class OptimizersContainer(torch.optim.Optimizer):
    """Several optimizers, each for its own parameters, as one: with one state to save and load."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        """Takes over the parts' groups; step the parts through this only."""
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # from load_state_dict: other groups, another state
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of each part.

        Args:
            closure: computes the loss anew, once before all parts.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["peak"]
