"""Watching a run: spikes stop it and nothing is lost, FLOPs and MFU are the cost model's."""

import math
import random
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import run_helpers as runs
from mor.errors import ConfigError, MissingExtraError
from mor.model.config import MoRConfig
from mor.model.cost import training_flops
from mor.model.transformer import MoRModel
from mor.train.config import TrainConfig
from mor.train.metrics_file import MetricsFile
from mor.train.schedule import step_flops
from mor.train.spike_detector import Watch
from mor.train.throughput import gemm_peak

pytestmark = pytest.mark.usefixtures("one_thread")


def watching(tmp_path: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Watch:
    config = TrainConfig(sequence_length=16, batch_size=4, **changes)
    model = MoRConfig(**runs.MODEL, vocab_size=64)
    return Watch(config, model, tmp_path, torch.device("cpu"), rows or [])


def noisy(num: int, spread: float, seed: int = 0) -> list[float]:
    """A falling loss with noise."""
    draw = random.Random(seed)
    return [3 + 4 * math.exp(-i / 30) + draw.gauss(0, spread) for i in range(num)]


# The rule


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_falling_loss_never_stops(tmp_path: Path, spread: float, seed: int) -> None:
    rule = watching(tmp_path)
    for step, loss in enumerate(noisy(1000, spread, seed)):
        rule.check(step, loss, 1.0)
    assert rule._limit() > 3


@pytest.mark.parametrize(("spread", "minimum", "maximum"), [(0.01, 0.4, 0.7), (0.3, 2, 4.5)])
def test_how_much_is_a_spike_follows_the_noise(
    tmp_path: Path, spread: float, minimum: float, maximum: float
) -> None:
    rule = watching(tmp_path)
    for step, loss in enumerate(noisy(400, spread)):
        rule.check(step, loss, 1.0)
    rule.check(400, 3 + minimum, 1.0)
    with pytest.raises(ConfigError, match=r"the loss spiked to .* at step 401 .*no checkpoint was"):
        rule.check(401, 3 + maximum, 1.0)


def test_the_threshold_can_be_set_and_switched_off(tmp_path: Path) -> None:
    for threshold, limit in ((10.0, 3.5), (40.0, 5.0), (0.0, math.inf)):
        rule = watching(tmp_path, spike_threshold=threshold)
        for step in range(50):
            rule.check(step, 3.0, 1.0)
        assert rule._limit() == pytest.approx(limit)
    with pytest.raises(ConfigError, match="spike_threshold=-1 must be 0 or more"):
        TrainConfig(spike_threshold=-1)


def test_the_first_steps_and_a_spike_itself_are_no_measure(tmp_path: Path) -> None:
    rule = watching(tmp_path)
    for step in range(19):
        rule.check(step, 3.0, 1.0)
    rule.check(19, 100.0, 1.0)  # too early to tell
    for _ in range(30):  # asking again changes nothing
        with pytest.raises(ConfigError, match="spiked"):
            rule.check(20, 90.0, 1.0)


def test_a_resumed_run_judges_as_the_whole_one_would(tmp_path: Path) -> None:
    losses = noisy(130, 0.2)
    whole = watching(tmp_path)
    for step, loss in enumerate(losses):
        whole.check(step, loss, 1.0)
    rows = [{"loss": loss, "flops": 7.0 * i} for i, loss in enumerate(losses)]
    resumed = watching(tmp_path, rows)
    assert resumed._limit() == whole._limit()
    assert resumed.count(130) - 7.0 * 129 == pytest.approx(whole.count(130))


# In a run


@pytest.fixture
def spikes_at_22(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 22nd step of the next run has a loss of its own."""
    calls, forward = [], MoRModel.forward

    def spiking(self: MoRModel, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        calls.append(self.training)
        if self.training and sum(calls) == 22:
            out.loss.data += 40
        return out

    monkeypatch.setattr(MoRModel, "forward", spiking)


@pytest.mark.usefixtures("spikes_at_22")
def test_a_spike_ends_a_run_that_then_goes_on_as_if_nothing_had_been(
    corpus: Path, tmp_path: Path
) -> None:
    values = runs.settings(corpus, save_every=2, eval_every=12)
    out = tmp_path / "run"
    with pytest.raises(
        ConfigError, match=r"at step 22 .*step-00000020; try a lower lr \(now 0\.01"
    ):
        runs.train(values, out)
    assert sorted(p.name for p in (out / "checkpoints").iterdir())[-1] == "step-00000020"
    assert [row["step"] for row in runs.rows(out)] == list(range(1, 22))
    resumed = runs.train({**values, "spike_threshold": 30.0}, out, resume="auto")
    assert resumed.step == 24
    runs.train(values, tmp_path / "whole")
    assert runs.result(out) == runs.result(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["vanilla", "expert", "token"])
def test_a_runs_flops_are_the_cost_models(corpus: Path, tmp_path: Path, kind: str) -> None:
    values = runs.settings(corpus, kind, steps=9, eval_every=0)
    model = runs.train(values, tmp_path).model.config
    lines = MetricsFile(tmp_path / "metrics.jsonl").rows()
    steps = [b["flops"] - a["flops"] for a, b in pairwise(lines)]
    planned = step_flops(TrainConfig.from_dict(values), model, 9)
    if kind == "vanilla":
        assert steps == pytest.approx([planned] * 8)
    elif kind == "expert":  # capacities fall from 1 over the first six steps
        assert steps[:5] == sorted(steps[:5], reverse=True)
        assert steps[5:] == pytest.approx([planned] * 3)
    else:  # as many as the tokens took
        full = training_flops(model, 16, (1.0, 1.0, 1.0)) * 64
        minimum = training_flops(model, 16, (1.0, 0.0, 0.0)) * 64
        assert all(minimum <= step <= full for step in steps)
    assert all(0 < row["mfu"] < 2 and row["memory_bytes"] > 2**20 for row in lines)


def test_the_peak_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    assert gemm_peak(torch.device("cpu"), torch.float32) > 1e8
    assert torch.equal(torch.get_rng_state(), before)


# TensorBoard


def test_tensorboard_shows_the_same_numbers(corpus: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    values = runs.settings(corpus, steps=6, eval_every=3, tensorboard=True)
    seen: list[dict[str, Any]] = []
    options: dict[str, Any] = {"on_step": seen.append, "should_stop": lambda: len(seen) == 4}
    runs.train(values, tmp_path, **options)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000005")  # steps 4 and 5 come again
    runs.train(values, tmp_path, resume="auto")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "grad_norm", "mfu", "nll_threshold"):
        lines = MetricsFile(tmp_path / "metrics.jsonl").rows()
        expected = [(row["step"], row[name]) for row in lines if name in row]
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(step, pytest.approx(value)) for step, value in expected]
    assert [e.value for e in events.Scalars("depth_histogram/0")] == [0, 0]


def test_tensorboard_that_is_missing_is_named_before_anything_is_written(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mixture-of-recursions\[track\]'"):
        runs.train(runs.settings(corpus, tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()
