"""Paired timing, activation memory, and the comparisons of `mor bench train`."""

import dataclasses
import json

import pytest
import torch

from mor.bench import timing
from mor.bench import train_step as steps
from mor.bench.timing import PairedTimes, paired
from mor.bench.train_ab import Comparison, Stepper, compare, comparisons, saved_bytes
from mor.bench.train_step import TrainStepConfig
from mor.cli.main import main
from mor.errors import ConfigError
from mor.machine import machine
from tiny import tiny_config


def test_paired_runs_alternate_and_take_the_median_of_ratios() -> None:
    order: list[str] = []
    times = paired(lambda: order.append("a"), lambda: order.append("b"), rounds=3, warmup=1)
    assert "".join(order) == "abbaabba"
    assert len(times.a) == len(times.b) == 3
    fixed = PairedTimes(a=(2.0, 4.0, 9.0), b=(1.0, 4.0, 3.0))
    assert fixed.ratio == 2.0
    assert fixed.as_dict()["ratio_max"] == 3.0


def test_paired_sees_a_slower_side(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def takes(seconds: float) -> None:
        now[0] += seconds

    times = paired(lambda: takes(0.5), lambda: takes(0.125), rounds=5)
    assert (times.ratio, len(times.ratios)) == (4.0, 5)


def test_saved_bytes_counts_each_kept_storage_once() -> None:
    weight = torch.ones(4, requires_grad=True)
    x = torch.ones(1000, 4)

    def forward() -> torch.Tensor:
        y = x * weight  # keeps x (and weight, left out)
        return (y * y.exp()).sum()  # keeps y once, and exp(y)

    assert saved_bytes(forward, exclude=[weight]) == 3 * x.nbytes


@pytest.mark.parametrize("kind", ["expert", "token"])
def test_dropped_tokens_leave_no_activations(kind: str) -> None:
    """What is kept shrinks with the tokens that are there at each depth."""
    routed = Stepper(tiny_config(kind, vocab_size=16), 2, 64)
    full = Stepper(tiny_config("recursive", vocab_size=16), 2, 64)
    counts = routed.model(routed.batch[:, :-1]).recursion_counts
    there = sum(float((counts > depth).float().mean()) for depth in range(3))
    assert there < 2.8  # else the routers dropped too little to see
    expected = (2 + 2 * there) / (2 + 2 * 3)  # layers that a token passes, prelude and coda too
    share = routed.activation_bytes() / full.activation_bytes()
    assert expected - 0.1 < share < expected + 0.12


def test_compare_reports_what_the_bars_need() -> None:
    config = tiny_config("expert")
    comparison = Comparison(
        name="tiny",
        a=config,
        b=dataclasses.replace(config, capacities=(1.0, 1.0, 1.0)),
        batch_size=2,
        sequence_length=48,
        time_bar=1.05,
        memory_bar=1.05,
    )
    result = compare(comparison, rounds=2)
    json.dumps(result)
    assert 0.5 < result["flops_ratio"] < 1
    assert result["time_over_flops"] == pytest.approx(
        result["time"]["ratio"] / result["flops_ratio"]
    )
    assert result["activation_ratio"] < 0.85
    assert result["memory_ok"] == (result["activation_ratio"] <= 1.05 * result["flops_ratio"])


def test_the_two_comparisons_are_the_promised_ones() -> None:
    twin, dropping = comparisons()
    assert twin.b == twin.a.vanilla_twin()
    assert twin.b.num_hidden_layers == twin.a.num_hidden_layers
    assert dropping.a.num_recursions == 3
    assert dropping.b.capacities == (1.0, 1.0, 1.0)
    assert (dropping.batch_size, dropping.sequence_length) == (2, 512)


def test_steps_report_what_the_bars_need(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainStepConfig(
        preset="demo", models=("mor2", "token3"), rounds=2, batch_size=2, length=32
    )
    asked: dict[bool, list[str]] = {False: [], True: []}

    def peak_bytes(config: TrainStepConfig, name: str, resident: bool = False) -> int:
        asked[resident].append(name)
        return len(name) + 2 * resident

    monkeypatch.setattr(steps, "peak_bytes", peak_bytes)
    record = json.loads(json.dumps(steps.measure(config)))
    assert asked[False] == list(record["step_s"]) == ["vanilla", "mor3", "mor2", "token3"]
    assert asked[True] == asked[False]
    for name in ("mor2", "mor3"):
        model = record["models"][name]
        assert model["flops_ratio"] < 1
        assert model["time_over_flops"] == pytest.approx(model["ratio"] / model["flops_ratio"])
        assert model["ok"] == (model["ratio"] <= 1.07 * model["flops_ratio"])
    assert record["models"]["mor2"]["memory_ratio"] == pytest.approx(4 / 7)
    assert record["models"]["mor2"]["memory_ok"]
    assert record["models"]["mor2"]["resident_ratio"] == pytest.approx(6 / 9)
    assert record["gemm_share"] == record["vanilla_gflops"] / record["gemm_peak_gflops"]
    assert len(record["token_choice"]["token3"]["ratios"]) == 2
    names, rates, token = steps.tables(record)
    assert [row[0] for row in names[1]] == ["mor3", "mor2"]
    assert rates[1][0][-1] == "60%"
    assert token[1][0][:2] == ("token3", "mor3")


def test_forced_token_choice_is_ragged_and_as_deep_as_expert_choice() -> None:
    config = TrainStepConfig(preset="demo", batch_size=2, length=48)
    counts = config.stepper("token3").model(torch.zeros(2, 48, dtype=torch.long)).recursion_counts
    assert torch.bincount(counts.reshape(-1)).tolist() == [0, 32, 32, 32]
    assert (counts[0] > 1).sum() != (counts[1] > 1).sum()
    assert sum(config.model_config("mor3").depth_capacities) == pytest.approx(2)
    with pytest.raises(ConfigError, match=r"--models 'mor1' is unknown: vanilla, mor2"):
        config.model_config("mor1")


@pytest.mark.slow
def test_peak_memory_falls_with_fewer_tokens_and_with_recomputed_activations() -> None:
    config = TrainStepConfig(preset="demo", batch_size=6, length=512)
    assert steps.peak_bytes(config, "mor3") < steps.peak_bytes(config, "vanilla")
    recompute = [
        steps.peak_bytes(dataclasses.replace(config, activation_checkpointing=mode), "mor3")
        for mode in ("none", "recursion", "full")
    ]
    assert recompute == sorted(recompute, reverse=True)
    assert recompute[2] < 0.9 * recompute[0]


def test_machine_names_what_a_record_needs() -> None:
    record = machine()
    assert record["torch"] == torch.__version__
    assert record["cpu"]
    assert record["command"].startswith("mor")


@pytest.mark.parametrize(
    "args", [["bench", "trian"], ["bench", "train", "--only", "twins"], ["bench", "train", "-x"]]
)
def test_wrong_words_are_named(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(args)
    except SystemExit as left:
        status = left.code
    assert status in (1, 2)
    assert "error" in capsys.readouterr().err
