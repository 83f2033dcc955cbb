"""FLOPs and MFU of a run are the cost model's."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

import run_helpers as runs
from mor.model.config import MoRConfig
from mor.model.cost import training_flops
from mor.train.config import TrainConfig
from mor.train.metrics_file import MetricsFile
from mor.train.schedule import step_flops
from mor.train.throughput import FlopsMeter, gemm_peak

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_resumed_run_counts_on() -> None:
    config = TrainConfig(sequence_length=16, batch_size=4)
    model, cpu = MoRConfig(**runs.MODEL, vocab_size=64), torch.device("cpu")
    rows = [{"flops": 7.0}, {"flops": 14.0}, {"loss": 1.0}]  # a line of an older run has none
    step = FlopsMeter(config, model, cpu).add_step(130)
    assert FlopsMeter(config, model, cpu, rows).add_step(130) == pytest.approx(step + 14.0)
    assert step == pytest.approx(step_flops(config, model, 130))


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
