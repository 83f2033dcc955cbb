"""`mor demo`: train an MoR model and its plain twin, and compare them."""

from collections.abc import Sequence
from pathlib import Path

from mor.cli.options.parser import parser
from mor.demo import Demo
from mor.errors import ConfigError
from mor.terminal.console import console

EXAMPLES = (
    "mor demo",
    "mor demo --minutes 1 --out runs/quick",
)


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    p = parser(
        "demo",
        "Train a Mixture-of-Recursions model, its vanilla twin at equal FLOPs and random routing "
        "on the standard library's source; compare them and generate colored text. Interrupted, "
        "the same command goes on where it was.",
        EXAMPLES,
    )
    p.add_argument("--minutes", type=float, default=5.0, help="time for the whole demo (default 5)")
    p.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the results")
    options = p.parse_args(list(args))
    if not 0 < options.minutes < float("inf"):
        raise ConfigError(f"--minutes {options.minutes} must be above 0, e.g. 5.")
    return Demo(out=options.out, minutes=options.minutes, screen=console()).run()
