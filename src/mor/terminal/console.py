"""The consoles, error messages and progress bars that all commands share."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def console() -> Console:
    """A console on standard output; plain text without line breaks of its own in a pipe."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def err_console() -> Console:
    """A console on standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def fail(message: str, status: int = 1) -> int:
    """Print an error message on standard error; returns the exit status."""
    err_console().print(f"[bold red]error:[/] {_escape(message)}")
    return status


def _escape(text: str) -> str:
    """Text in which rich does not read square brackets as markup."""
    return text.replace("[", r"\[")


def progress() -> Progress:
    """A progress bar on standard error; silent when that is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err_console(),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
