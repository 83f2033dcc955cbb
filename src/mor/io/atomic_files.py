"""Write files and folders that appear complete or not at all."""

import errno
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from mor.errors import CapacityError, DataError, MorError


def storage_error(path: Path, error: OSError, kind: type[MorError] = DataError) -> MorError:
    """The error to raise when writing `path` failed.

    Returns:
        CapacityError when the disk or the quota is full, `kind` for any other cause.
    """
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CapacityError(f"{path}: {reason}: free some space or choose another disk.")
    return kind(f"{path}: cannot be written ({reason}): choose a place that can be.")


def write_file(path: Path, data: bytes) -> None:
    """Replace a file's content in one step: readers see the old or the new one, never a part."""
    staged = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            # On disk before the rename: else a power cut may leave the new name without content.
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def staged_folder(target: Path) -> Generator[Path, None, None]:
    """A new folder that is renamed to `target` when the `with` block ends without an error.

    What a killed process left of earlier tries is removed; `target` must not exist yet.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    staged = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    staged.mkdir()
    try:
        yield staged
        for file in staged.iterdir():
            _sync(file)
        staged.replace(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
