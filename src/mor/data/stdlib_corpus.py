"""Real text that needs no download: the source of the running interpreter's standard library."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from mor.data.sources import Document
from mor.errors import DataError

_LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "turtledemo")


def stdlib_documents(root: Path | None = None) -> Iterator[Document]:
    """Python files of the standard library in a fixed order, tests left out; about 11 MB.

    Raises:
        DataError: this interpreter comes without its library's source.
    """
    folder = root or Path(sysconfig.get_paths()["stdlib"])
    found = 0
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if any(part in _LEFT_OUT for part in inside.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few modules hold other encodings on purpose
        if text.strip():
            found += 1
            yield Document(inside.as_posix(), text)
    if not found:
        raise DataError(
            f"{folder} holds no Python source: this interpreter comes without its library's text; "
            "give `data` a folder made by `mor data build` instead."
        )
