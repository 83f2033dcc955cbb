"""`mor experiment`: a grid of training runs, one table and one plot."""

import fcntl
import gc
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from mor.cli.options.parser import parser
from mor.errors import ConfigError, MorError
from mor.experiments.experiment import Experiment, PlannedRun
from mor.experiments.results import collect, planned, rows, write
from mor.io.atomic_files import storage_error
from mor.terminal.console import console, err_console
from mor.terminal.table import print_table
from mor.terminal.training_progress import watched
from mor.train.trainer import Trainer

HELP = "Run a grid of trainings, and compare them in one table and one plot."

EXAMPLES = (
    "mor experiment configs/experiments/smoke.yaml --plan",
    "mor experiment configs/experiments/smoke.yaml --out runs/smoke-experiment",
    "mor experiment configs/experiments/table3_cpu.yaml --data data/english",
)


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    p = parser("experiment", HELP, EXAMPLES)
    p.add_argument("spec", help="YAML file: variants, sizes, budgets and seeds")
    p.add_argument("--out", default=None, help="folder; default runs/<spec's name>")
    p.add_argument("--data", default=None, help="corpus folder, instead of the spec's")
    p.add_argument("--plan", action="store_true", help="list the runs, and do nothing")
    options = p.parse_args(args)
    changes = {} if options.data is None else {"data": options.data}
    experiment = Experiment.read(Path(options.spec), **changes)
    out = Path(options.out or Path("runs") / experiment.name)
    screen = console()
    if options.plan:
        header = ("run", "steps", "parameters, no embedding", "training FLOPs")
        lines = planned(experiment.runs)
        print_table(screen, header, lines)
        total = sum(
            cell.flops for cell, line in zip(experiment.runs, lines, strict=True) if line[3]
        )
        screen.print(f"{len(lines)} runs, {total:.3g} training FLOPs, as far as known before.")
        return 0
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(out, error) from error
    command = " ".join(["mor experiment", *args])
    with _alone(out):
        with screen.status("preparing the text ..."):
            experiment = experiment.prepare(out)
        return _run_all(screen, experiment, out, command)


@contextmanager
def _alone(out: Path) -> Generator[None, None, None]:
    """Lock the folder for this process; the system unlocks it however the process ends."""
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{out} is in use by another `mor experiment`: wait for it, or choose another "
                "--out."
            ) from error
        yield


def _run_all(screen: Console, experiment: Experiment, out: Path, command: str) -> int:
    """Train every run that is not done, and write the results after each; a failure ends none."""
    cells, failures = experiment.runs, dict[str, str]()
    states = [cell.state(out / "runs" / cell.name) for cell in cells]  # a changed spec shows here
    done = states.count("done")
    if done:
        screen.print(f"{done} of {len(cells)} runs are done.")
    for number, (cell, state) in enumerate(zip(cells, states, strict=True), start=1):
        if state == "done":
            continue
        screen.print(f"[{number}/{len(cells)}] {cell.name}", markup=False)
        try:
            finished = _train(screen, cell, out / "runs" / cell.name)
        except (MorError, RuntimeError, OSError) as error:  # torch raises RuntimeErrors
            failures[cell.name] = f"failed: {error}"
            err_console().print(f"{cell.name} failed: {error}", markup=False)
            finished = True
        gc.collect()  # the model and its optimizer
        write(experiment, out, command, failures)
        if not finished:
            screen.print("stopped and saved; the same command goes on from here.")
            return 0
    complete = write(experiment, out, command, failures)
    header, lines = rows(collect(experiment, out, failures))
    print_table(screen, header, lines, left=(0, 1))
    screen.print(f"{out}: results.md, results.json, plot.svg. Next: `mor report {out}/runs/*`.")
    return 0 if complete else 1


def _train(screen: Console, cell: PlannedRun, folder: Path) -> bool:
    """Train or resume one run; False if the user asked to stop."""
    with watched(screen, cell.config) as (on_step, should_stop):
        trainer = Trainer(
            cell.config, folder, resume="auto", on_step=on_step, should_stop=should_stop
        )
        return trainer.run() == "finished"
