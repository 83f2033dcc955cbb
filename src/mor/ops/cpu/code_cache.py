"""Numba's cache of machine code on disk, kept in step with the sources.

Numba compiles a function again when the function's own file has changed. Here functions call each
other across files, and machine code holds what it calls: after a change in one file, cached code of
the others would go on with the old one, and give wrong results without a word.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

STAMP = "mor_sources.txt"
"""File in the cache's folder: which sources the machine code beside it was compiled from."""


def drop_stale_code(folder: Path, sources: Iterable[Path]) -> bool:
    """Delete a folder's cached machine code if it was compiled from other sources; whether it did.

    To be called before the first compiled function runs. A cache that cannot be written is left as
    it is: then nothing was cached there either.

    Args:
        folder: where Numba keeps the code of functions of these sources.
        sources: all files whose functions call each other.
    """
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    stamp, current = folder / STAMP, digest.hexdigest()
    try:
        if stamp.exists() and stamp.read_text() == current:
            return False
        stale = [path for path in folder.iterdir() if path.suffix in (".nbi", ".nbc")]
        for path in stale:
            path.unlink(missing_ok=True)  # another process may be as far as we are
        stamp.write_text(current)
    except OSError:
        return False
    return bool(stale)
