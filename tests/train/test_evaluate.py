"""What a run measures: thresholds that keep the capacities' share, losses, JSON lines."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mor.errors import CapacityError, DataError
from mor.model.transformer import MoRModel
from mor.train.calibrate import calibrate
from mor.train.evaluate import evaluate
from mor.train.metrics_file import MetricsFile
from tiny import KINDS, tiny_model

EXPERT = [kind for kind in KINDS if kind.startswith("expert")]


def windows(num: int, time: int = 40, rows: int = 3, seed: int = 0) -> list[Tensor]:
    """Batches of (rows, time + 1) tokens; the last batch is smaller."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 61, (num * rows - 1, time + 1), generator=generator).split(rows))


def present(model: MoRModel, batches: list[Tensor]) -> list[int]:
    """Tokens at each depth under the threshold rule."""
    counts = torch.cat(
        [model(b[:, :-1], selection="threshold").recursion_counts.view(-1) for b in batches]
    )
    return [int((counts > r).sum()) for r in range(model.config.num_recursions)]


# Calibration


@pytest.mark.parametrize("kind", EXPERT)
def test_calibrated_thresholds_keep_the_capacities_share(kind: str) -> None:
    model, batches = tiny_model(kind), windows(3)
    model.set_thresholds(calibrate(model, batches))
    there = present(model, batches)
    before, previous = sum(b[:, 1:].numel() for b in batches), 1.0
    # A random router's logit depends on the position alone, so 8 windows cross together.
    slack = 8 if kind == "expert_random" else 1
    for tokens, capacity in zip(there, model.config.capacities, strict=True):
        assert abs(tokens - before * capacity / previous) <= slack
        before, previous = tokens, capacity
    assert there[-1] > 0


@pytest.mark.parametrize("kind", EXPERT)
def test_calibrating_changes_nothing_but_what_it_returns(kind: str) -> None:
    model, batches = tiny_model(kind).train(), windows(2)
    config, state = model.config, {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    first = calibrate(model, batches)
    assert model.config == config
    assert model.router.config == config
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert calibrate(model.eval(), batches) == first
    assert not model.training
    # Nor does it depend on the thresholds that were there before.
    model.set_thresholds((0.3,) * model.config.num_recursions)
    assert calibrate(model, batches) == first


def test_a_depth_that_keeps_everybody_lets_everybody_pass() -> None:
    model, batches = tiny_model("expert", capacities=(1.0, 1.0, 0.5)), windows(2)
    thresholds = calibrate(model, batches)
    assert all(math.isfinite(tau) for tau in thresholds)
    assert json.loads(json.dumps(thresholds)) == list(thresholds)
    model.set_thresholds(thresholds)
    num = sum(b[:, 1:].numel() for b in batches)
    assert present(model, batches)[:2] == [num, num]
    assert abs(present(model, batches)[2] - num / 2) <= 1


def test_calibration_lies_between_the_last_that_stays_and_the_first_that_goes() -> None:
    model, batches = tiny_model("expert_bare"), windows(2)
    thresholds = calibrate(model, batches)
    model.set_thresholds(thresholds)
    logits = []
    for batch in batches:
        _, _, record = model.hidden_states(batch[:, :-1], "threshold")
        logits.append(record.decisions)
    for depth, tau in enumerate(thresholds):
        values = torch.cat([decisions[depth] for decisions in logits])
        min_staying = values[values >= tau].min()
        best_going = values[values < tau].max()
        assert tau == pytest.approx(float(min_staying + best_going) / 2)


# Evaluation


def direct(model: MoRModel, batches: list[Tensor], selection: str) -> tuple[float, Tensor]:
    """Mean loss and all (B, T) recursion counts, from whole logits, one window at a time."""
    nll, counts = [], []
    for window in torch.cat(batches):
        out = model(window[None, :-1], selection=selection)
        nll.append(F.cross_entropy(out.logits[0].detach(), window[1:], reduction="none"))
        counts.append(out.recursion_counts)
    return float(torch.cat(nll).mean()), torch.cat(counts)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_equals_a_direct_computation(kind: str) -> None:
    model, batches = tiny_model(kind), windows(2, time=20)
    result = evaluate(model, batches)
    topk, ranked = direct(model, batches, "topk")
    causal, counts = direct(model, batches, "threshold")
    assert result.nll_topk == pytest.approx(topk, rel=1e-9)
    assert result.nll_threshold == pytest.approx(causal, rel=1e-9)
    assert result.causal_gap == pytest.approx(causal - topk, abs=1e-9)
    assert result.tokens == counts.numel() == 5 * 20
    depths = range(model.config.num_recursions + 1)
    shares = [float((counts == r).double().mean()) for r in depths]
    assert result.depth_histogram == pytest.approx(shares)
    expert = model.config.routing == "expert_choice"
    if not expert:
        assert result.nll_topk == result.nll_threshold
    assert (result.router_accuracy is None) == (not expert)
    if kind in EXPERT and kind != "expert_random":
        deepest = (ranked == model.config.num_recursions).any(0)
        assert result.dead_share == pytest.approx(1 - float(deepest.double().mean()))
    else:
        assert result.dead_share is None


def test_the_two_rules_differ_and_accuracy_is_their_agreement() -> None:
    """One depth that drops: accuracy is the share of equal decisions there."""
    model = tiny_model("expert", num_recursions=2, capacities=(1.0, 0.5), thresholds=(0.0, 0.1))
    (batch,) = windows(1, time=30, rows=2)
    result = evaluate(model, [batch])
    _, ranked = direct(model, [batch], "topk")
    _, counts = direct(model, [batch], "threshold")
    agree = float((ranked == counts).double().mean())
    assert result.router_accuracy == pytest.approx(agree)  # depth 0 decides nothing
    assert 0 < agree < 1
    assert result.nll_topk != result.nll_threshold


def test_evaluating_leaves_the_model_as_it_was() -> None:
    model = tiny_model("expert_random").train()
    rng = torch.get_rng_state()
    first = evaluate(model, windows(1))
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert evaluate(model, windows(1)) == first
    assert first.as_dict()["nll_topk"] == first.nll_topk
    assert all(p.grad is None for p in model.parameters())


def test_evaluating_on_nothing_is_refused() -> None:
    model = tiny_model("expert").train()
    with pytest.raises(DataError, match="nothing to evaluate on"):
        evaluate(model, [])
    assert model.training


# The file


def row(step: int, **more: object) -> dict[str, object]:
    return {"step": step, "loss": 1 / step, "tokens": 8 * step, **more}


def test_rows_come_back(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert metrics.rows() == []
    metrics.truncate_after(3)  # nothing there: nothing to do
    assert not metrics.path.exists()
    for step in (1, 2, 3):
        metrics.append(row(step, depth_histogram=(0.5, 0.5)))
    assert metrics.rows() == [row(step, depth_histogram=[0.5, 0.5]) for step in (1, 2, 3)]
    assert MetricsFile(metrics.path).rows() == metrics.rows()
    assert len(metrics.path.read_text().splitlines()) == 3


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    assert metrics.rows() == [{"step": 1, "loss": None, "grad_norm": None, "lr": 0.1}]
    assert "NaN" not in metrics.path.read_text()


def test_cutting_drops_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 8):
        metrics.append(row(step))
    metrics.truncate_after(5)
    assert [r["step"] for r in metrics.rows()] == [1, 2, 3, 4, 5]
    metrics.append(row(6, again=True))
    assert metrics.rows()[-1] == row(6, again=True)
    metrics.truncate_after(0)
    assert metrics.rows() == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("kept", [1, 12, 25])
def test_a_half_written_last_line_is_passed_over_and_cut(tmp_path: Path, kept: int) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append(row(1))
    metrics.append(row(2))
    whole = metrics.path.read_bytes()
    metrics.path.write_bytes(whole + json.dumps(row(3)).encode()[:kept])
    assert [r["step"] for r in metrics.rows()] == [1, 2]
    metrics.truncate_after(2)
    assert metrics.path.read_bytes() == whole
    metrics.append(row(3))
    assert metrics.rows() == [row(1), row(2), row(3)]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append(row(1))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    actions = (
        (Path, "open", lambda: metrics.append(row(2))),
        (os, "fsync", lambda: metrics.truncate_after(0)),
    )
    for place, name, action in actions:
        with monkeypatch.context() as patched:
            patched.setattr(place, name, full)
            with pytest.raises(CapacityError, match=r"metrics\.jsonl: No space left on device"):
                action()
    assert metrics.rows() == [row(1)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
