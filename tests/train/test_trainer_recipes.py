"""What a training config asks for is what the trainer does."""

from pathlib import Path

import pytest

import run_helpers as runs
from mor.train.config import TrainConfig
from mor.train.evaluate import evaluate
from mor.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_balancing_warms_up(corpus: Path, tmp_path: Path) -> None:
    """At the start of a long warm-up a run is as one without balancing, but not at its end."""
    final = {}
    for name, warmup, coeff in (("none", 0, 0.0), ("long", 10**9, 10.0), ("over", 1, 10.0)):
        values = runs.settings(corpus, "token", steps=6, balancing_warmup_steps=warmup)
        values["model"] = {**values["model"], "balancing_coeff": coeff}
        runs.train(values, tmp_path / name)
        final[name] = [row["loss"] for row in runs.rows(tmp_path / name)]
    assert final["long"] == pytest.approx(final["none"], abs=1e-4)
    assert final["over"] != pytest.approx(final["none"], abs=1e-2)


@pytest.mark.parametrize("mask", [False, True])
def test_attention_may_stay_inside_documents(corpus: Path, tmp_path: Path, mask: bool) -> None:
    """In training, calibration and evaluation alike."""
    sizes = {"sequence_length": 32, "batch_size": 8, "steps": 1, "capacity_warmup_steps": 0}
    values = runs.settings(corpus, mask_documents=mask, **sizes)
    trainer = Trainer(TrainConfig.from_dict(values), tmp_path)
    model, end = trainer.model.train(), trainer.tokenizer.eos_id
    batch = trainer._batches.at(0)
    assert (batch[:, 1:-1] == end).any()
    losses = [
        model(batch[:, :-1], targets=batch[:, 1:], document_end=e).loss.item() for e in (None, end)
    ]
    assert abs(losses[0] - losses[1]) > 1e-5
    trainer.run()
    (row,) = runs.rows(tmp_path)
    assert row["loss"] == losses[mask]
    windows = trainer._eval_batches
    nll = [evaluate(trainer.model, windows, e).nll_threshold for e in (None, end)]
    assert row["nll_threshold"] == nll[mask] != nll[not mask]
