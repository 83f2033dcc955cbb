"""`mor bench throughput` and `latency`: the options become the fields of `ThroughputConfig`."""

from typing import Any

import pytest

from mor.bench import latency, throughput
from mor.bench.throughput import ThroughputConfig
from mor.cli.bench.main import run
from mor.errors import ConfigError

OPTIONS = (
    *("--models", "mor4", "--prompt", "9", "--output", "5", "--seconds", "0.5", "--rounds", "2"),
    *("--preset", "360m", "--dtype", "half", "--num-scheduler-steps", "3", "--json"),
)


class ReachedError(Exception):
    """The measurement would begin now."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[ThroughputConfig]:
    found: list[ThroughputConfig] = []

    def measure(config: ThroughputConfig, note: Any) -> None:
        found.append(config)
        raise ReachedError

    for module in (throughput, latency):
        monkeypatch.setattr(module, "measure", measure)
    return found


@pytest.mark.parametrize(
    ("what", "max_num_seqs"), [("throughput", 4), ("latency", 1)], ids=["throughput", "latency"]
)
def test_options_become_fields(what: str, max_num_seqs: int, seen: list[ThroughputConfig]) -> None:
    for options in ((), (*OPTIONS, "--decode-only")):
        with pytest.raises(ReachedError):
            run([what, "--max-num-seqs", "4", *options])
    assert seen == [
        ThroughputConfig(max_num_seqs=max_num_seqs),
        ThroughputConfig(
            preset="360m",
            models=("mor4",),
            max_num_seqs=max_num_seqs,
            prompt=9,
            output=5,
            decode_only=True,
            rounds=2,
            seconds=0.5,
            dtype="float16",
            num_scheduler_steps=3,
        ),
    ]


def test_an_unknown_model_is_refused(seen: list[ThroughputConfig]) -> None:
    with pytest.raises(ConfigError, match="'mor1' is unknown: mor2, mor3, mor4"):
        run(["throughput", "--models", "mor1"])
    assert not seen
