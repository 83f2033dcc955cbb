"""TensorBoard shows the lines of metrics.jsonl."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import run_helpers as runs
from mor.errors import MissingExtraError
from mor.train.metrics_file import MetricsFile

pytestmark = pytest.mark.usefixtures("one_thread")


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
