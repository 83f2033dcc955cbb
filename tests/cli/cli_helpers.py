"""Calling `mor` in-process and as a program of its own; what the fixtures of this folder give."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mor.cli.main import main

MAIN = "import sys; from mor.cli.main import main; sys.exit(main())"


class Called(NamedTuple):
    """What one call of `mor` did."""

    status: int
    out: str
    err: str


Mor = Callable[..., Called]


class TinyRun(NamedTuple):
    """Files and folders of the trained run."""

    text: Path
    corpus: Path
    config: Path
    run: Path


def invoke(*args: object) -> int:
    """Exit status of `mor ARGS`, run in this process."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as leave:  # the option parser's way out
        return leave.code if isinstance(leave.code, int) else -1


def environment(**extra: str) -> dict[str, str]:
    """Environment of a program that no setting of the developer's makes colorful."""
    kept = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **extra}


def start(*args: object, **extra: str) -> "subprocess.Popen[str]":
    """`mor ARGS` as a program of its own, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment(**extra),
    )


def one_sentence(called: Called, status: int) -> str:
    """The message of a call that failed as it should: no output, no traceback, one error line."""
    assert called.status == status
    assert called.out == ""
    assert "Traceback" not in called.err
    first, *hints = called.err.splitlines()
    assert first.startswith("error: ")
    assert all(line.startswith("  `mor ") for line in hints), called.err
    return first.removeprefix("error: ")
