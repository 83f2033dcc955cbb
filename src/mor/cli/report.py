"""`mor report`: one page of curves of several training runs laid over each other."""

from collections.abc import Sequence
from pathlib import Path

from mor.cli.options.parser import parser
from mor.errors import CapacityError, ConfigError
from mor.io.atomic_files import storage_error, write_file
from mor.machine import machine
from mor.report.run_page import find_runs, run_report
from mor.terminal.console import console

HELP = "Curves and final numbers of training runs, as one HTML page that needs nothing else."

EXAMPLES = (
    "mor report runs/smoke",
    "mor report runs/vanilla runs/mor2 runs/mor3 --out compare.html",
    "mor report runs/smoke-experiment    # all runs of an experiment",
)


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    p = parser("report", HELP, EXAMPLES)
    p.add_argument("runs", nargs="+", help="folders of runs, or of experiments")
    p.add_argument("--out", default="report.html", help="file to write")
    options = p.parse_args(args)
    runs = find_runs([Path(run) for run in options.runs])
    here = machine()
    footer = f"{here['command']}\ntorch {here['torch']}, commit {here['commit']}"
    out = Path(options.out)
    if out.is_dir():
        raise ConfigError(f"--out={out} is a folder: give a file to write, such as report.html.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, run_report(runs, footer).encode())
    except OSError as error:
        raise storage_error(out, error, CapacityError) from error
    console().print(f"{out}: {len(runs)} run{'s' if len(runs) > 1 else ''}.")
    return 0
