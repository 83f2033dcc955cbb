"""The optimizer of a run: AdamW, or Muon and AdamW side by side as one."""

from collections.abc import Callable
from typing import Any

import torch

from mor.model.transformer import MoRModel
from mor.train.config import TrainConfig


def build_optimizer(model: MoRModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW for all parameters, or Muon for the layers' matrices and AdamW for the rest.

    Weight decay is `weight_decay` on matrices, `embedding_weight_decay` on embedding and head, 0 on
    norms. Each group's `peak` is its peak learning rate divided by `lr` (`set_learning_rate`).
    """
    # `parameters()` gives a tied weight once, so it is updated once, in the group of the ends.
    trained = [p for p in model.parameters() if p.requires_grad]
    # Tensors are told apart by identity: comparing them would compare their elements.
    ends = {id(model.embed_tokens.weight), id(model.lm_head.weight)}
    layers = {id(p) for part in (model.prelude, model.block, model.coda) for p in part.parameters()}
    matrices = [p for p in trained if p.ndim >= 2 and id(p) not in ends]
    decay, end_decay = config.weight_decay, config.embedding_weight_decay
    # Not the LoRA pairs of depths, which have three axes: Muon would make all the directions of
    # these small matrices equally strong. Nor the routers, which lie outside of the layers.
    layer_matrices = [p for p in matrices if p.ndim == 2 and id(p) in layers]
    muon_params = layer_matrices if config.optimizer == "muon" else []
    by_muon = {id(p) for p in muon_params}
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
    if not muon_params:
        return allocate_optimizer_state(adamw)
    muon_lr = config.lr if config.muon_lr is None else config.muon_lr
    muon = torch.optim.Muon(
        [{"params": muon_params, "peak": muon_lr / config.lr}],
        lr=muon_lr,
        weight_decay=decay,
        momentum=config.muon_momentum,
        adjust_lr_fn="match_rms_adamw",  # updates as large as AdamW's at the same rate
    )
    return allocate_optimizer_state(OptimizersContainer(muon, adamw))


def allocate_optimizer_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Allocate the moments of an optimizer of AdamW's and Muon's groups, and return it.

    Allocated in the first step they would lie between gradients. The holes that freed gradients
    leave between them are too small for any activation, so a CPU process would hold the gradients'
    size once more for good.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "momentum" in group:  # Muon's
                optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}
            else:
                step = torch.zeros((), device=p.device)
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": step, **moments}
    return optimizer


class OptimizersContainer(torch.optim.Optimizer):
    """Several optimizers, each for its own parameters, with one state to save and load.

    torchtitan's class of this name; here it is an `Optimizer` itself, whose groups are those of its
    parts in order. No parameter may be in two parts: it would be updated twice.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        """Takes over the parts' groups; from now on only `step` of the whole may be called."""
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        self._share_state()

    def _share_state(self) -> None:
        """Give the parts this optimizer's own group dicts and state, so that they never differ."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by load_state_dict, which replaces the groups and the state by new objects.
        super().__setstate__(state)
        self._share_state()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of each part; returns the closure's loss, or None.

        Args:
            closure: computes the loss and gradients anew; called once, before the first part.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of each group to `rate` times its `peak`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["peak"]
