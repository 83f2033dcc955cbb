"""A run that is killed at any moment and resumed is the run that was never killed, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import run_helpers as runs

KINDS = ("muon", "expert", "loss_free", "random")


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    """A process that forks a training run for each request, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, runs.__file__]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def ask(server: subprocess.Popen[str], line: str) -> int:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(line + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def start(
    server: subprocess.Popen[str], values: dict[str, Any], out: Path, operations: int = 0
) -> int:
    """Begin or resume a run in a process of its own: the process's number."""
    return ask(server, json.dumps({"values": values, "out": str(out), "operations": operations}))


def status(server: subprocess.Popen[str]) -> int:
    """How the process ended: 0, or minus the signal. Until this is asked it stays a zombie."""
    return ask(server, "")


def finish(server: subprocess.Popen[str], values: dict[str, Any], out: Path) -> None:
    start(server, values, out)
    assert status(server) == 0


@pytest.fixture(scope="module")
def uninterrupted(
    server: subprocess.Popen[str], corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Any, ...]]:
    """What a run of each kind leaves that nobody disturbs."""
    whole = {}
    for kind in KINDS:
        out = tmp_path_factory.mktemp(kind) / "run"
        finish(server, runs.settings(corpus, kind), out)
        whole[kind] = runs.result(out)
    return whole


def wait_for_lines(out: Path, number: int) -> None:
    metrics, until = out / "metrics.jsonl", time.monotonic() + 60
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < number:
        assert time.monotonic() < until, "the run writes no metrics"
        time.sleep(0.001)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_some_time(
    server: subprocess.Popen[str],
    corpus: Path,
    tmp_path: Path,
    uninterrupted: dict[str, tuple[Any, ...]],
    kind: str,
    seed: int,
) -> None:
    """SIGKILL from outside, twice, once some lines are there."""
    values, out = runs.settings(corpus, kind), tmp_path / "run"
    draw = random.Random(f"{kind}{seed}")
    for lines in sorted(draw.sample(range(1, 20), 2)):
        child = start(server, values, out)
        wait_for_lines(out, lines)
        time.sleep(draw.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert status(server) in (-signal.SIGKILL, 0)
    finish(server, values, out)
    assert runs.result(out) == uninterrupted[kind]


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))]
)
def test_killed_at_some_file_operation(
    server: subprocess.Popen[str],
    corpus: Path,
    tmp_path: Path,
    uninterrupted: dict[str, tuple[Any, ...]],
    seed: int,
) -> None:
    """SIGKILL three times, in the middle of opening a run, of a line, of a save, of clearing up."""
    values, out = runs.settings(corpus, "expert"), tmp_path / "run"
    draw = random.Random(seed)
    for _ in range(3):
        start(server, values, out, operations=draw.randint(1, 90))
        assert status(server) == -signal.SIGKILL
    finish(server, values, out)
    assert runs.result(out) == uninterrupted["expert"]
    assert not [path for path in (out / "checkpoints").iterdir() if ".tmp-" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize("operations", range(1, 150, 3))
def test_killed_at_every_third_file_operation(
    server: subprocess.Popen[str],
    corpus: Path,
    tmp_path: Path,
    uninterrupted: dict[str, tuple[Any, ...]],
    operations: int,
) -> None:
    values, out = runs.settings(corpus, "expert"), tmp_path / "run"
    start(server, values, out, operations)
    assert status(server) == -signal.SIGKILL
    finish(server, values, out)
    assert runs.result(out) == uninterrupted["expert"]
