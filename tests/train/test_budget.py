"""Budgets: what is read, the steps they come to, and runs that end by the clock."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import run_helpers as runs
from mor.errors import ConfigError
from mor.model.cost import sequence_flops
from mor.train import trainer as trainer_module
from mor.train.budget import Budget
from mor.train.config import TrainConfig
from mor.train.schedule import is_last_step, resolve_steps, step_flops, total_steps
from mor.train.trainer import Trainer
from tiny import tiny_config

# Reading


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("300 steps", 300, "steps"),
        ("1 step", 1, "steps"),
        ("2k steps", 2000, "steps"),
        ("20M tokens", 20e6, "tokens"),
        ("1.5 B Tokens", 1.5e9, "tokens"),
        ("1e15 flops", 1e15, "flops"),
        ("16.5e18 FLOPs", 16.5e18, "flops"),
        ("2PFLOPs", 2e15, "flops"),
        ("1_000 tokens", 1000, "tokens"),
        ("5 minutes", 300, "seconds"),
        ("1 min", 60, "seconds"),
        ("0.5 hours", 1800, "seconds"),
        (" 90 seconds ", 90, "seconds"),
    ],
)
def test_what_is_read(text: str, amount: float, unit: str) -> None:
    assert Budget.parse(text) == Budget(amount, unit)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "300",
            "steps",
            "",
            "-3 steps",
            "+3 steps",
            "3 m",
            "3 apples",
            "3 steps more",
            "1e steps",
        ),
        *(
            "0x10 steps",
            "3,000 steps",
            "nan steps",
            "inf flops",
            ".5 hours",
            "3 Z flops",
            "1 2 steps",
        ),
    ],
)
def test_what_is_not_read(text: str) -> None:
    with pytest.raises(ConfigError, match=r"budget=.*like '300 steps', '20M tokens'"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0 steps", "0.0 minutes", "1e999 flops"])
def test_nothing_and_everything_are_no_budgets(text: str) -> None:
    with pytest.raises(ConfigError, match="above 0 and finite"):
        Budget.parse(text)


def test_a_step_is_whole() -> None:
    assert Budget.parse("1.5k steps").amount == 1500
    with pytest.raises(ConfigError, match="whole number of steps"):
        Budget.parse("1.5 steps")


@given(
    number=st.floats(1e-6, 1e24),
    scale=st.sampled_from([("", 1), ("k", 1e3), ("M", 1e6), ("B", 1e9), ("G", 1e9), ("T", 1e12)]),
    unit=st.sampled_from(["token", "tokens", "FLOPs", "flop"]),
    gaps=st.tuples(st.sampled_from(["", " ", "  "]), st.sampled_from(["", " "])),
)
def test_every_number_is_read_as_written(
    number: float, scale: tuple[str, float], unit: str, gaps: tuple[str, str]
) -> None:
    budget = Budget.parse(f"{number!r}{gaps[0]}{scale[0]}{gaps[1]}{unit}")
    assert budget.amount == number * scale[1]
    assert Budget.parse(str(budget)) == budget


@given(text=st.text(max_size=20), good=st.sampled_from(["3 steps", "1e6 flops", "2 minutes"]))
def test_text_around_a_budget_is_refused(text: str, good: str) -> None:
    for whole in (text + good, good + text):
        if not (text.isalnum() or set(text) <= set("0123456789._ \t\n")):
            with pytest.raises(ConfigError, match="budget="):
                Budget.parse(whole)
    assert Budget.parse(f" {good} ") == Budget.parse(good)


def test_a_training_config_reads_it_when_it_is_built() -> None:
    assert TrainConfig.from_dict({"budget": "20M tokens"}).budget == "20M tokens"
    for bad in ("20M", 300):
        with pytest.raises(ConfigError, match=r"budget=.*'300 steps'"):
            TrainConfig.from_dict({"budget": bad})


# Steps


def steps_of(budget: str, kind: str = "expert", **changes: Any) -> int:
    sizes = {"sequence_length": 8, "batch_size": 4, **changes}
    config = TrainConfig(budget=budget, **sizes)
    return resolve_steps(config, tiny_config(kind)).steps


def test_steps_and_tokens() -> None:
    assert steps_of("17 steps") == 17
    assert steps_of("320 tokens") == 10
    assert (steps_of("335 tokens"), steps_of("337 tokens"), steps_of("17 tokens")) == (10, 11, 1)
    with pytest.raises(ConfigError, match=r"'15 tokens' is not enough for a step, .* 32 tokens"):
        steps_of("15 tokens")
    with pytest.raises(ConfigError, match=r"not enough for a step, which takes .* flops"):
        steps_of("10 flops")


@given(
    exponent=st.floats(5.5, 9.5),
    warmup=st.integers(0, 30),
    kind=st.sampled_from(["expert", "expert_bare", "vanilla", "recursive", "token"]),
)
def test_flops_are_spent_to_the_nearest_step(exponent: float, warmup: int, kind: str) -> None:
    amount, model = 10**exponent, tiny_config(kind)
    config = TrainConfig(
        budget=f"{amount!r} flops", sequence_length=8, batch_size=1, capacity_warmup_steps=warmup
    )
    first = step_flops(config, model, 0)
    if amount < first * 0.5:
        with pytest.raises(ConfigError, match="not enough for a step"):
            resolve_steps(config, model)
        return
    steps = resolve_steps(config, model).steps
    head = [step_flops(config, model, step) for step in range(min(steps, warmup))]
    spent = sum(head) + max(0, steps - warmup) * step_flops(config, model, warmup + 1)
    last = step_flops(config, model, steps)
    assert abs(spent - amount) <= max([last, *head[-1:]]) * 0.5 * (1 + 1e-9)


def test_flops_of_a_step_by_hand() -> None:
    """Three forward passes; with warm-up the tokens that top-k takes at that step."""
    model = tiny_config("expert", capacities=(1.0, 0.5, 0.2))
    config = TrainConfig(sequence_length=8, batch_size=4, capacity_warmup_steps=10)
    last = 3 * 32 * sequence_flops(model, 8, depth_fractions=(1.0, 4 / 8, 1 / 8)).mean
    assert step_flops(config, model, 10) == pytest.approx(last)
    half_way = 3 * 32 * sequence_flops(model, 8, depth_fractions=(1.0, 6 / 8, 4 / 8)).mean
    assert step_flops(config, model, 4) == pytest.approx(half_way)
    assert step_flops(config, model, 0) > half_way > last


def test_one_budget_gives_models_of_other_costs_other_steps() -> None:
    model = tiny_config("expert")
    assert steps_of("1e9 flops", "expert") > 0
    config = TrainConfig(sequence_length=8, batch_size=4, budget="1e9 flops")
    mor, twin = (resolve_steps(config, m) for m in (model, model.vanilla_twin()))
    ratio = step_flops(config, model, 0) / step_flops(config, model.vanilla_twin(), 0)
    assert twin.steps == pytest.approx(mor.steps * ratio, rel=0.01)
    assert ratio < 1


# By the clock


@given(steps=st.integers(1, 300), limit=st.floats(1, 100))
def test_a_steady_pace_gives_the_course_of_as_many_steps(steps: int, limit: float) -> None:
    config = TrainConfig(budget=f"{limit!r} seconds")
    pace = limit / steps
    for step in range(1, steps + 1):
        assert total_steps(config, step, step * pace) == pytest.approx(steps)
        assert is_last_step(step, total_steps(config, step, step * pace)) == (step == steps)
    assert total_steps(TrainConfig(steps=7), 3, 1.0) == 7


class Clock:
    """Time that goes on by one second at each look: every step takes one second."""

    def __init__(self) -> None:
        self.now, self.step_s = 0.0, 1.0

    def perf_counter(self) -> float:
        self.now += self.step_s
        return self.now


def test_a_run_by_the_clock_cools_down_and_resumes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it on a machine that is three times as fast as the other half's."""
    clock, out = Clock(), tmp_path / "run"
    monkeypatch.setattr(trainer_module, "time", clock)
    values = runs.settings(
        corpus,
        budget="0.5 minutes",
        warmup_fraction=0.1,
        cooldown_fraction=0.5,
        save_every=0,
        eval_every=20,
    )
    seen: list[dict[str, Any]] = []
    first = Trainer(
        TrainConfig.from_dict(values),
        out,
        on_step=seen.append,
        should_stop=lambda: sum(row["step_s"] for row in seen) >= 14,
    )
    assert first.run() == "stopped"
    clock.step_s = 1 / 3
    second = Trainer(TrainConfig.from_dict(values), out, on_step=seen.append, resume="auto")
    assert (second.step, second.elapsed) == (first.step, first.elapsed)
    assert second.run() == "finished"
    assert second.finished
    assert sum(row["step_s"] for row in seen) == pytest.approx(30, abs=1)
    assert seen[-1]["total_steps"] == seen[-1]["step"] == len(seen)
    rates = [row["lr"] for row in seen]
    assert max(rates) == 0.01
    assert rates[10] == 0.01
    fall = [rate for rate in rates[len(rates) // 2 :] if rate < 0.01]
    assert len(fall) > 20
    assert all(a > b for a, b in pairwise(fall))
    assert fall[-1] < 0.001
    assert Trainer(TrainConfig.from_dict(values), out, resume="auto").run() == "finished"
