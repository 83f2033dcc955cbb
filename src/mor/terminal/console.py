"""Consoles, option parsing and progress that all verbs share."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def console() -> Console:
    """Standard output; plain text when it is not a terminal."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def err_console() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def fail(message: str, status: int = 1) -> int:
    """Say what went wrong on standard error; returns the exit status."""
    err_console().print(f"[bold red]error:[/] {_plain(message)}")
    return status


def _plain(text: str) -> str:
    """Text whose square brackets rich leaves alone."""
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
