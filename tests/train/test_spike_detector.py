"""A loss that spikes stops the run, and nothing is lost."""

import math
import random
from pathlib import Path
from typing import Any

import pytest

import run_helpers as runs
from mor.errors import ConfigError
from mor.model.transformer import MoRModel
from mor.train.config import TrainConfig
from mor.train.spike_detector import SpikeDetector

pytestmark = pytest.mark.usefixtures("one_thread")


def detector(
    tmp_path: Path, rows: list[dict[str, Any]] | None = None, **changes: Any
) -> SpikeDetector:
    return SpikeDetector(TrainConfig(**changes), tmp_path, rows or [])


def noisy(num: int, spread: float, seed: int = 0) -> list[float]:
    """A falling loss with noise."""
    draw = random.Random(seed)
    return [3 + 4 * math.exp(-i / 30) + draw.gauss(0, spread) for i in range(num)]


# The rule


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_falling_loss_never_stops(tmp_path: Path, spread: float, seed: int) -> None:
    rule = detector(tmp_path)
    for step, loss in enumerate(noisy(1000, spread, seed)):
        rule.check(step, loss, 1.0)
    assert rule.limit() > 3


@pytest.mark.parametrize(("spread", "minimum", "maximum"), [(0.01, 0.4, 0.7), (0.3, 2, 4.5)])
def test_how_much_is_a_spike_follows_the_noise(
    tmp_path: Path, spread: float, minimum: float, maximum: float
) -> None:
    rule = detector(tmp_path)
    for step, loss in enumerate(noisy(400, spread)):
        rule.check(step, loss, 1.0)
    rule.check(400, 3 + minimum, 1.0)
    with pytest.raises(ConfigError, match=r"the loss spiked to .* at step 401 .*no checkpoint was"):
        rule.check(401, 3 + maximum, 1.0)


def test_the_threshold_can_be_set_and_switched_off(tmp_path: Path) -> None:
    for threshold, limit in ((10.0, 3.5), (40.0, 5.0), (0.0, math.inf)):
        rule = detector(tmp_path, spike_threshold=threshold)
        for step in range(50):
            rule.check(step, 3.0, 1.0)
        assert rule.limit() == pytest.approx(limit)
    with pytest.raises(ConfigError, match="spike_threshold=-1 must be a finite number >= 0"):
        TrainConfig(spike_threshold=-1)


def test_the_first_steps_and_a_spike_itself_are_no_measure(tmp_path: Path) -> None:
    rule = detector(tmp_path)
    for step in range(19):
        rule.check(step, 3.0, 1.0)
    rule.check(19, 100.0, 1.0)  # too early to tell
    for _ in range(30):  # asking again changes nothing
        with pytest.raises(ConfigError, match="spiked"):
            rule.check(20, 90.0, 1.0)


def test_a_resumed_run_judges_as_the_whole_one_would(tmp_path: Path) -> None:
    losses = noisy(130, 0.2)
    whole = detector(tmp_path)
    for step, loss in enumerate(losses):
        whole.check(step, loss, 1.0)
    resumed = detector(tmp_path, [{"loss": loss} for loss in losses])
    assert resumed.limit() == whole.limit()


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
