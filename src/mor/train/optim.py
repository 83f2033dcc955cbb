"""The optimizer, and schedules as pure functions of the step."""

import math

import torch
from torch import nn

from mor.model.config import MoRConfig
from mor.model.router import warmed_capacity
from mor.train.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; each tied parameter is updated once."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)


def learning_rate(config: TrainConfig, step: int, total: float | None = None) -> float:
    """Learning rate of optimizer step `step`, numbered from 0.

    `trapezoid`: linear rise, plateau, linear fall. `cosine`: linear rise, cosine fall. Both fall to
    `final_lr_fraction` of the peak.

    Args:
        total: steps of the whole run as far as is known now; None: `steps`.
    """
    total = config.steps if total is None else total
    warmup = max(1, round(config.warmup_fraction * total))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        height = 0.5 * (1 + math.cos(math.pi * done))
    else:
        cooldown = round(config.cooldown_fraction * total)
        height = max(0.0, min(1.0, (total - step) / (cooldown + 1)))
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * height)


def capacities_at(model: MoRConfig, config: TrainConfig, step: int) -> tuple[float, ...] | None:
    """(R,) capacities of step `step`, numbered from 0; None where the model has none."""
    if model.capacities is None:
        return None
    warmup = config.capacity_warmup_steps
    return tuple(warmed_capacity(c, step + 1, warmup) for c in model.capacities)
