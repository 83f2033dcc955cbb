"""What a build of a corpus has done so far, so that one that was cut off goes on.

While a build runs it writes into a folder beside its target, `NAME.partial`. `journal.jsonl` in it
has a line for each thing that is done: the plan, the survey of all documents, and now and then a
state of the shards that is on disk. A build of the same plan goes on from the last state; another
plan starts anew.
"""

import json
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mor.errors import DataError
from mor.io.atomic_files import storage_error

JOURNAL_FILE = "journal.jsonl"
CORPUS_FOLDER = "corpus"  # what is written, and takes the place of the target in the end
_LOCK_FILE = "lock"


class Journal:
    """The journal of one build, in its folder."""

    def __init__(self, folder: Path, plan: Sequence[Any]) -> None:
        """Read what is there; drop all of it if it belongs to another plan."""
        self.folder = folder
        self._path = folder / JOURNAL_FILE
        self.entries: dict[str, Any] = {}
        """The last value of each kind."""
        for line in self._lines():
            self.entries.update(line)
        plain = json.loads(json.dumps(plan))
        half = "survey" in self.entries and not (folder / CORPUS_FOLDER).is_dir()  # it was finished
        if self.entries.get("plan") != plain or half:
            self.clear()
            self.entries = {}
            self.record("plan", plain)

    def _lines(self) -> list[dict[str, Any]]:
        """All whole lines; what comes after a line that was cut off is forgotten."""
        if not self._path.is_file():
            return []
        data, whole = self._path.read_bytes(), 0
        lines: list[dict[str, Any]] = []
        for raw in data.splitlines(keepends=True):
            try:
                line = json.loads(raw)
            except ValueError:
                break
            if not raw.endswith(b"\n"):
                break
            lines.append(line)
            whole += len(raw)
        if whole < len(data):
            os.truncate(self._path, whole)
        return lines

    def record(self, kind: str, value: Any) -> None:
        """Add a line, on disk when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({kind: value}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries[kind] = value

    def clear(self) -> None:
        """Remove all but the lock: what no part of a corpus is, before it takes its place."""
        for path in self.folder.iterdir():
            if path.name == _LOCK_FILE:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextmanager
def open_journal(out: Path, plan: Sequence[Any]) -> Generator[Journal, None, None]:
    """The journal of a build of `out`; its folder is kept if the build is cut off.

    Raises:
        DataError: another build of `out` is going on, or the folder cannot be written.
    """
    folder = out.with_name(f"{out.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK_FILE).open("w") as lock:
            _lock(lock.fileno(), out)
            journal = Journal(folder, plan)
            try:
                yield journal
            except BaseException as error:
                done = "survey" in journal.entries and not isinstance(error, DataError)
                if not done and "fetching" not in journal.entries:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise storage_error(out, error) from error


def _lock(handle: int, out: Path) -> None:
    with suppress(ImportError):  # Windows has none
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{out}: another build of it is going on: wait for it, or choose another folder."
            ) from error
