"""Runs of `mor train` with several ranks, as torchrun would start them.

Run as a script it is a server: it imports torch once, then forks the ranks of each run it is asked
for. `Ranks` is its client.
"""

import faulthandler
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

_PATIENCE_S = 100


class Ranks:
    """Starts, kills and awaits the ranks of one run at a time."""

    def __enter__(self) -> "Ranks":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command, pipe = [sys.executable, __file__], subprocess.PIPE
        self._server = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def _ask(self, **question: Any) -> list[int]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, values: dict[str, Any], out: Path, ranks: int, **environment: str) -> list[int]:
        """Begin a run or resume it; returns the processes' numbers.

        What rank i prints is in `<out>.rank<i>`.
        """
        config = out.with_name(f"{out.name}.yaml")
        config.write_text(yaml.safe_dump(values))
        return self._ask(config=str(config), out=str(out), ranks=ranks, environment=environment)

    def statuses(self) -> list[int]:
        """How each process ended: its exit status, or minus the signal."""
        return self._ask(config=None)

    def train(self, values: dict[str, Any], out: Path, ranks: int) -> Path:
        """A whole run."""
        self.start(values, out, ranks)
        ends = self.statuses()
        assert ends == [0] * ranks, [said(out, rank) for rank in range(ranks)]
        return out

    def kill_after(
        self, values: dict[str, Any], out: Path, ranks: int, lines: int, draw: random.Random
    ) -> None:
        """A run whose ranks are all killed some time after it has written so many lines."""
        numbers = self.start(values, out, ranks)
        wait_for_lines(out, lines)
        time.sleep(draw.uniform(0, 0.03))
        for number in numbers:
            os.kill(number, signal.SIGKILL)
        assert set(self.statuses()) <= {0, 1, -signal.SIGKILL}


def wait_for_lines(out: Path, number: int) -> None:
    """Until a run has written so many lines of metrics."""
    metrics, until = out / "metrics.jsonl", time.monotonic() + _PATIENCE_S
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < number:
        assert time.monotonic() < until, "the run writes no metrics"
        time.sleep(0.001)


def said(out: Path, rank: int) -> str:
    """What a rank has printed."""
    return out.with_name(f"{out.name}.rank{rank}").read_text()


def _be_rank(rank: int, asked: dict[str, Any], port: int) -> None:
    from mor.cli.main import main

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(asked["ranks"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"} | asked["environment"]
    out = Path(asked["out"])
    with out.with_name(f"{out.name}.rank{rank}").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    faulthandler.enable()
    status = 1
    try:
        status = main(["train", asked["config"], "--out", str(out), "--resume", "auto"])
    except SystemExit as left:
        status = int(left.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(status)


def _await(children: list[int]) -> list[int]:
    """Exit statuses; who hangs is made to say where."""
    statuses, until = dict[int, int](), time.monotonic() + _PATIENCE_S
    while len(statuses) < len(children):
        for child in children:
            if child in statuses:
                continue
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                os.kill(child, signal.SIGABRT)
        time.sleep(0.005)
    return [statuses[child] for child in children]


def serve() -> None:
    """Answer each line of JSON: fork the ranks of a run, or wait for all of them."""
    import torch._dynamo  # which the first optimizer would import in every child
    import torch.distributed.checkpoint

    import mor.cli.train

    assert torch._dynamo
    assert torch.distributed.checkpoint
    assert mor.cli.train
    children: list[int] = []
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["config"] is None:
            answer = _await(children)
        else:
            # As torchrun does, hold the place where the ranks meet.
            store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
            children = []
            for rank in range(asked["ranks"]):
                child = os.fork()
                if child == 0:
                    _be_rank(rank, asked, store.port)
                children.append(child)
            answer = children
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
