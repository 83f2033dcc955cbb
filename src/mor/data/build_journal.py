"""`Journal`: what a build of a corpus has done so far, so that one that was cut off goes on.

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
CORPUS_FOLDER = "corpus"  # below `NAME.partial`: the corpus, which is moved to `NAME` in the end
_LOCK_FILE = "lock"


class Journal:
    """The journal of one build: a file of lines `{kind: value}` and the last value of each kind.

    Kinds: `plan` (everything the corpus depends on), `fetching` (datasets on the hub), `survey`
    (what the first pass over the documents has found), `state` (how far the shards are on disk).
    """

    def __init__(self, folder: Path, plan: Sequence[Any]) -> None:
        """Read the journal in `folder`; delete the folder's content if it is of another plan.

        Args:
            plan: plain data; another plan means another corpus.
        """
        self.folder = folder
        self._path = folder / JOURNAL_FILE
        self.entries: dict[str, Any] = {}
        """The last value of each kind."""
        for line in self._lines():
            self.entries.update(line)
        plain = json.loads(json.dumps(plan))  # as it comes back from the file: tuples are lists
        # Surveyed but without a corpus: that build moved it to its place and was killed after that.
        is_finished = "survey" in self.entries and not (folder / CORPUS_FOLDER).is_dir()
        if self.entries.get("plan") != plain or is_finished:
            self.clear()
            self.entries = {}
            self.record("plan", plain)

    def _lines(self) -> list[dict[str, Any]]:
        """All lines up to the first that is not complete; the file is cut there."""
        if not self._path.is_file():
            return []
        data, num_good_bytes = self._path.read_bytes(), 0
        lines: list[dict[str, Any]] = []
        for raw in data.splitlines(keepends=True):
            try:
                line = json.loads(raw)
            except ValueError:
                break
            if not raw.endswith(b"\n"):
                break
            lines.append(line)
            num_good_bytes += len(raw)
        if num_good_bytes < len(data):
            os.truncate(self._path, num_good_bytes)
        return lines

    def record(self, kind: str, value: Any) -> None:
        """Append a line, which is on disk when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({kind: value}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries[kind] = value

    def clear(self) -> None:
        """Delete everything in the folder but the lock, which this process holds."""
        for path in self.folder.iterdir():
            if path.name == _LOCK_FILE:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextmanager
def open_journal(out: Path, plan: Sequence[Any]) -> Generator[Journal, None, None]:
    """Context with the journal of a build of `out`.

    Its folder is deleted at the end; it is kept for the next call if the build is cut off after
    the survey, or while it fetches from the hub.

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
                # A DataError would come again; before the survey there is nothing to go on from.
                can_go_on = "survey" in journal.entries and not isinstance(error, DataError)
                if not can_go_on and "fetching" not in journal.entries:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise storage_error(out, error) from error


def _lock(handle: int, out: Path) -> None:
    """Hold the file until this process ends or closes it; DataError if another holds it."""
    with suppress(ImportError):  # Windows has none
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{out}: another build of it is going on: wait for it, or choose another folder."
            ) from error
