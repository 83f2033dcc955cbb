"""What changes over a run, by the step: its end, learning rate, capacities, balancing."""

import math
from dataclasses import replace

from mor.errors import ConfigError
from mor.model.config import MoRConfig
from mor.model.cost import training_flops
from mor.model.router import capacity_at_step
from mor.train.budget import Budget
from mor.train.config import TrainConfig

_GUESS = 1000  # steps of a run with a budget of time, until its first step has been timed


def step_flops(config: TrainConfig, model: MoRConfig, step: int) -> float:
    """Training FLOPs of optimizer step `step` (from 0): three times its tokens' forward passes.

    Expert choice is counted with the tokens that it selects at this step, capacity warm-up
    included; token choice as if its router were balanced.
    """
    length, depth_fractions = config.sequence_length, None
    capacities = capacities_at_step(model, config, step)
    if capacities is not None:
        depth_fractions = tuple(max(1, int(c * length)) / length for c in capacities)
    return config.tokens_per_step * training_flops(model, length, depth_fractions)


def resolve_steps(config: TrainConfig, model: MoRConfig) -> TrainConfig:
    """The config with `steps` set to the number of steps nearest to its budget.

    A budget of time leaves `steps` alone: `total_steps` estimates it during the run.

    Raises:
        ConfigError: the budget is less than half a step.
    """
    budget = None if config.budget is None else Budget.parse(config.budget)
    if budget is None or budget.unit == "seconds":
        return config
    if budget.unit == "flops":
        warmup = config.capacity_warmup_steps if model.capacities is not None else 0
        left, steps = budget.amount, 0
        # Steps of a capacity warm-up differ in cost, so they are paid for one by one, each as long
        # as half of it is left; all later ones cost the same.
        while steps < warmup and left >= (cost := step_flops(config, model, steps)) / 2:
            left, steps = left - cost, steps + 1
        later = step_flops(config, model, warmup)
        if steps == warmup:
            steps += max(0, round(left / later))
        one = step_flops(config, model, 0)
    else:
        one = config.tokens_per_step if budget.unit == "tokens" else 1
        steps = round(budget.amount / one)
    if steps < 1:
        raise ConfigError(
            f"budget={config.budget!r} is not enough for a step, which takes {one:.3g} "
            f"{budget.unit}: raise it, or lower batch_size or sequence_length."
        )
    return replace(config, steps=steps)


def total_steps(config: TrainConfig, step: int, elapsed: float) -> float:
    """Steps of the whole run; with a budget of time as many as fit at the mean pace so far.

    Args:
        step: optimizer steps done.
        elapsed: seconds that they took.
    """
    budget = None if config.budget is None else Budget.parse(config.budget)
    if budget is None or budget.unit != "seconds":
        return config.steps
    return budget.amount * step / elapsed if step and elapsed else _GUESS


def is_last_step(step: int, total: float) -> bool:
    """Whether a run of `total` steps, not always a whole number, ends after `step` steps."""
    return step > 0 and step + 0.5 >= total


def learning_rate(config: TrainConfig, step: int, total: float | None = None) -> float:
    """Learning rate of optimizer step `step` (from 0).

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
        # + 1: the last step, total - 1, still learns a little.
        height = max(0.0, min(1.0, (total - step) / (cooldown + 1)))
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * height)


def capacities_at_step(
    model: MoRConfig, config: TrainConfig, step: int
) -> tuple[float, ...] | None:
    """(R,) capacities at optimizer step `step` (from 0); None where the model has none."""
    if model.capacities is None:
        return None
    warmup = config.capacity_warmup_steps
    return tuple(capacity_at_step(c, step + 1, warmup) for c in model.capacities)


def balancing_strength(config: TrainConfig, step: int) -> float:
    """Share of token choice's balancing strength at step `step` (from 0): rises linearly to 1."""
    return min(1.0, (step + 1) / max(1, config.balancing_warmup_steps))
