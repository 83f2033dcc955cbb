"""The source of the running interpreter's standard library, as text that needs no download."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from mor.data.sources import Document
from mor.errors import DataError

_SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "turtledemo")
)


def stdlib_documents(root: Path | None = None) -> Iterator[Document]:
    """The standard library's Python files, one document each, without its tests; about 11 MB.

    Args:
        root: folder to read instead.

    Raises:
        DataError: this interpreter comes without its library's source.
    """
    folder = root or Path(sysconfig.get_paths()["stdlib"])
    found = 0
    # Sorted, so that the corpus does not depend on the file system.
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if not _SKIPPED_FOLDERS.isdisjoint(inside.parts):
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
