"""Schedules as functions of the step, parameter groups, and configs that cannot work."""

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor.errors import ConfigError
from mor.model.transformer import MoRModel
from mor.train.config import TrainConfig
from mor.train.optim import build_optimizer, set_learning_rate
from mor.train.schedule import balancing_strength, capacities_at_step, learning_rate
from tiny import KINDS, tiny_config


def rates(**changes: Any) -> list[float]:
    config = TrainConfig(**{"lr": 0.5, **changes})
    return [learning_rate(config, step) for step in range(config.steps)]


# Learning rate


def test_a_trapezoid_by_hand() -> None:
    course = rates(steps=10, warmup_fraction=0.2, cooldown_fraction=0.4)
    assert course == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1])


@given(steps=st.integers(1, 400), warmup=st.floats(0, 0.5), cooldown=st.floats(0, 0.5))
def test_a_trapezoid_rises_stays_and_falls(steps: int, warmup: float, cooldown: float) -> None:
    course = rates(steps=steps, warmup_fraction=warmup, cooldown_fraction=cooldown)
    rise = max(1, round(warmup * steps))
    fall = round(cooldown * steps)
    assert course[:rise] == pytest.approx([0.5 * (i + 1) / rise for i in range(rise)])
    assert course[rise : steps - fall] == [0.5] * (steps - fall - rise)
    slope = course[max(rise, steps - fall - 1) :]
    assert all(a > b for a, b in pairwise(slope))
    if fall and fall + rise <= steps:
        assert course[-1] == pytest.approx(0.5 / (fall + 1))
    assert all(0 < rate <= 0.5 for rate in course)


def test_the_paper_recipe() -> None:
    config = TrainConfig(steps=1000)
    assert learning_rate(config, 0) == pytest.approx(3e-3 / 50)
    assert learning_rate(config, 49) == 3e-3 == learning_rate(config, 799)
    assert learning_rate(config, 900) == pytest.approx(3e-3 / 2, rel=0.01)
    assert learning_rate(config, 999) < 3e-3 / 100


def test_a_cosine() -> None:
    course = rates(steps=100, schedule="cosine", warmup_fraction=0.1, cooldown_fraction=0.2)
    assert course[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert course[10] == 0.5
    assert course[55] == pytest.approx(0.25)
    expected = [0.25 * (1 + math.cos(math.pi * (i - 10) / 90)) for i in range(10, 100)]
    assert course[10:] == pytest.approx(expected)
    assert 0 < course[-1] < 0.001


@pytest.mark.parametrize("schedule", ["trapezoid", "cosine"])
def test_the_fall_may_end_above_nothing(schedule: str) -> None:
    course, zero = (
        rates(steps=1000, schedule=schedule, final_lr_fraction=end) for end in (0.1, 0.0)
    )
    assert course == pytest.approx([z if i < 50 else 0.05 + 0.9 * z for i, z in enumerate(zero)])


@pytest.mark.parametrize("schedule", ["trapezoid", "cosine"])
def test_one_step_trains_at_the_peak(schedule: str) -> None:
    assert rates(steps=1, schedule=schedule) == [0.5]


# Parameter groups


def groups_of(model: MoRModel, **changes: Any) -> dict[str, dict[str, Any]]:
    """The settings that each parameter is trained with, by its name."""
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, TrainConfig(**changes))
    found = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())  # tied ones once
    return dict(found)


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_decay_and_norms_do_not(kind: str) -> None:
    model = MoRModel(tiny_config(kind))
    groups = groups_of(model, weight_decay=0.3, beta1=0.8, beta2=0.7, lr=0.01)
    for name, group in groups.items():
        assert group["weight_decay"] == (0.0 if "norm" in name else 0.3)
        assert (group["betas"], group["lr"]) == ((0.8, 0.7), 0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_muon_takes_the_matrices_of_layers(kind: str) -> None:
    model = MoRModel(tiny_config(kind))
    changes = {"lr": 0.01, "muon_lr": 0.05, "muon_momentum": 0.9, "weight_decay": 0.3}
    groups = groups_of(model, optimizer="muon", embedding_weight_decay=0.1, **changes)
    for name, group in groups.items():
        layer = name.startswith(("prelude", "block", "coda"))
        layer = layer and "norm" not in name and "delta_" not in name
        assert group.get("momentum") == (0.9 if layer else None)
        assert group["lr"] == (0.05 if layer else 0.01)
        ends = "embed" in name or "lm_head" in name
        assert group["weight_decay"] == (0.0 if "norm" in name else 0.1 if ends else 0.3)
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon", **changes))
    set_learning_rate(optimizer, 0.002)
    rates = {g["lr"] for g in optimizer.param_groups}
    assert sorted(rates) == pytest.approx([0.002, 0.01])


def gradients(model: MoRModel, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw)


def test_muon_steps_as_torchs_own() -> None:
    """And its first update is a rotation, as large as 0.2 in the mean square over the wide side."""
    model, other = (MoRModel(tiny_config("expert")) for _ in range(2))
    other.load_state_dict(model.state_dict())
    config = TrainConfig(optimizer="muon", lr=0.01, muon_lr=0.02, weight_decay=0.0)
    ours = build_optimizer(model, config)
    weight, theirs = model.block[0].mlp.up_proj.weight, other.block[0].mlp.up_proj.weight
    plain = torch.optim.Muon([theirs], 0.02, 0.0, adjust_lr_fn="match_rms_adamw")
    before = weight.detach().clone()
    for step in range(3):
        gradients(model, step)
        theirs.grad = weight.grad
        ours.step()
        plain.step()
        assert torch.equal(weight, theirs)
        if step == 0:
            update = (before - weight).detach() / 0.02
            singular = torch.linalg.svdvals(update) / (0.2 * max(weight.shape) ** 0.5)
            assert 0.4 < singular.min() < singular.max() < 1.6
    assert not torch.equal(model.embed_tokens.weight, other.embed_tokens.weight)


def test_muon_and_adamw_save_and_load_one_state() -> None:
    model, other = (MoRModel(tiny_config("token")) for _ in range(2))
    config = TrainConfig(optimizer="muon", lr=0.01)
    optimizer = build_optimizer(model, config)
    for step in range(2):
        gradients(model, step)
        optimizer.step()
    other.load_state_dict(model.state_dict())
    resumed = build_optimizer(other, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(2, 4):
        for m, o in ((model, optimizer), (other, resumed)):
            gradients(m, step)
            o.step()
    moved = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in moved)
    assert len(resumed.state) == len(list(other.parameters()))
    calls: list[float] = []
    assert resumed.step(lambda: calls.append(1.0) or 2.5) == 2.5
    assert calls == [1.0]


def test_what_is_frozen_is_not_trained() -> None:
    model = MoRModel(tiny_config("expert"))
    model.prelude.requires_grad_(False)
    trained = {
        id(p) for g in build_optimizer(model, TrainConfig()).param_groups for p in g["params"]
    }
    assert not trained & {id(p) for p in model.prelude.parameters()}
    assert {id(p) for p in model.block.parameters()} <= trained


def test_weight_decay_shrinks_a_matrix_without_gradient() -> None:
    model = MoRModel(tiny_config("vanilla"))
    before = model.block[0].mlp.up_proj.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, TrainConfig(weight_decay=0.5, lr=0.1)).step()
    torch.testing.assert_close(model.block[0].mlp.up_proj.weight, before * (1 - 0.05))
    assert (model.norm.weight == 1).all()


# Capacities


def test_capacities_fall_from_one_to_the_models() -> None:
    model = tiny_config("expert", capacities=(1.0, 0.5, 0.2))
    config = TrainConfig(steps=100, capacity_warmup_steps=10)
    course = [capacities_at_step(model, config, step) for step in range(20)]
    assert course[4] == pytest.approx((1.0, 0.75, 0.6))  # half-way after five steps
    assert course[9:] == [pytest.approx((1.0, 0.5, 0.2))] * 11
    assert all(0.5 < c[1] < 1 for c in course[:9])
    for depth in (1, 2):
        assert all(a[depth] >= b[depth] for a, b in pairwise(course))
    assert all(c[0] >= c[1] >= c[2] for c in course)


def test_capacities_without_warmup_or_without_capacities() -> None:
    config = TrainConfig()
    assert capacities_at_step(tiny_config("expert_bare"), config, 0) == (0.8, 0.7, 0.3, 0.2)
    for kind in ("vanilla", "recursive", "token"):
        assert capacities_at_step(tiny_config(kind), config, 0) is None


def test_balancing_rises_to_its_full_strength() -> None:
    config = TrainConfig(balancing_warmup_steps=4)
    assert [balancing_strength(config, step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert balancing_strength(TrainConfig(), 0) == 1


# The training config


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict(values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("sequence_length", "an integer >= 1"),
        ("batch_size", "an integer >= 1"),
        ("micro_batch_size", "an integer >= 1"),
        ("steps", "an integer >= 1"),
        ("eval_windows", "an integer >= 1"),
        ("lr", "a finite number > 0"),
        ("muon_lr", "a finite number > 0"),
    ],
)
def test_what_must_be_positive(name: str, wanted: str) -> None:
    for value in (0, -3):
        assert refusal({name: value}) == f"{name}={value} must be {wanted}."


COUNTS = ["capacity_warmup_steps", "balancing_warmup_steps", "eval_every", "calibration_windows"]
COUNTS += ["save_every", "keep_checkpoints", "seed"]
NUMBERS = ["weight_decay", "embedding_weight_decay", "clip", "spike_threshold"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [*((name, "an integer") for name in COUNTS), *((name, "a finite number") for name in NUMBERS)],
)
def test_what_must_not_be_negative(name: str, wanted: str) -> None:
    assert refusal({name: -1}) == f"{name}=-1 must be {wanted} >= 0."


@pytest.mark.parametrize(
    "name",
    [
        "warmup_fraction",
        "cooldown_fraction",
        "final_lr_fraction",
        "beta1",
        "beta2",
        "muon_momentum",
    ],
)
def test_what_must_be_a_fraction(name: str) -> None:
    for value in (-0.1, 1.0, 1.5):
        assert refusal({name: value}) == f"{name}={value} must be a finite number in [0, 1)."


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"warmup_fraction": 0.6, "cooldown_fraction": 0.5},
            ["warmup_fraction=0.6", "cooldown_fraction=0.5", "sum must be <= 1"],
        ),
        ({"eval_windows": 0}, ["eval_windows=0", "an integer >= 1"]),
        (
            {"batch_size": 10, "micro_batch_size": 4},
            ["batch_size=10", "micro_batch_size=4", "whole micro-batches"],
        ),
        ({"btach_size": 4}, ["'btach_size' is unknown", "did you mean 'batch_size'?"]),
        ({3: 4}, ["3 is unknown", "known keys"]),
        ({"schedule": "cosin"}, ["schedule='cosin'", "did you mean 'cosine'?"]),
        ({"optimizer": "sgd"}, ["optimizer='sgd'", "adamw, muon"]),
        ({"precision": "fp16"}, ["precision='fp16'", "did you mean 'bf16'?"]),
        ({"init": "mean"}, ["init='mean'", "average, lower, random, stepwise, upper"]),
        ({"steps": 10.5}, ["steps=10.5", "an integer"]),
        ({"steps": "10"}, ["steps='10'", "an integer"]),
        ({"seed": True}, ["seed=True", "an integer"]),
        ({"micro_batch_size": "2"}, ["micro_batch_size='2'", "an integer"]),
        ({"lr": "3e-3"}, ["lr='3e-3'", "a finite number"]),
        ({"lr": None}, ["lr=None", "a finite number"]),
        ({"lr": math.nan}, ["lr=nan", "a finite number"]),
        ({"clip": math.inf}, ["clip=inf", "a finite number"]),
        ({"beta1": False}, ["beta1=False", "a finite number"]),
        ({"verify_data": "no"}, ["verify_data='no'", "true or false"]),
        ({"model": None}, ["model=None", "a mapping"]),
        ({"data": 3}, ["data=3", "text"]),
        ({"init_from": 3}, ["init_from=3", "a path"]),
    ],
)
def test_other_rules_are_named_with_their_cure(values: dict[Any, Any], words: list[str]) -> None:
    message = refusal(values)
    for word in words:
        assert word in message


def test_sizes_of_a_step() -> None:
    config = TrainConfig(batch_size=12, micro_batch_size=4, sequence_length=10)
    assert (config.micro_size, config.tokens_per_step) == (4, 120)
    whole = TrainConfig(batch_size=12, sequence_length=10)
    assert (whole.micro_size, whole.tokens_per_step) == (12, 120)
    assert TrainConfig.from_dict({"init_from": "a/b"}).init_from == Path("a/b")


def test_the_model_must_take_the_sequences() -> None:
    config = TrainConfig(sequence_length=64, model={"max_position_embeddings": 64})
    assert config.model_config().max_position_embeddings == 64
    longer = TrainConfig(sequence_length=65, model={"max_position_embeddings": 64})
    with pytest.raises(ConfigError, match=r"sequence_length=65 .*max_position_embeddings=64"):
        longer.model_config()
    with pytest.raises(ConfigError, match=r"'hiden' is unknown: did you mean 'hidden_size'"):
        TrainConfig(model={"hiden": 1}).model_config()
