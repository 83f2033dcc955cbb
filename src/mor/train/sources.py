"""Documents out of text files: `.txt` and its kin, `.jsonl` and `.jsonl.zst`.

Every complaint names the file and, where there is one, the line.
"""

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mor.errors import DataError, MissingExtraError, nearest

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")  # one document a file
LINES_SUFFIX = ".jsonl"  # one document a line
ZSTD_LINES_SUFFIX = ".jsonl.zst"
_SUFFIXES = (*TEXT_SUFFIXES, LINES_SUFFIX, ZSTD_LINES_SUFFIX)

_ZSTD_MAX_WINDOW_BYTES = 2**27  # what `zstd --long=27` packs with
_ZSTD_CHUNK_BYTES = 2**16  # packed bytes at a time, so that unpacked ones stay few


@dataclass(frozen=True)
class Document:
    """A text that belongs together: tokens of it never mix with those of another."""

    name: str
    """Decides whether the document is held out, so it should not change from build to build."""
    text: str

    def __post_init__(self) -> None:
        """Checks the text.

        Raises:
            DataError: it is not valid Unicode; JSON can smuggle in half a surrogate pair.
        """
        try:
            self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"document {self.name!r}: not valid Unicode ({error}): remove the lone surrogate."
            ) from error


@dataclass(frozen=True)
class SourceFile:
    """A file to read and the name of it that does not depend on where its folder lies."""

    path: Path
    name: str


class SourceDocuments:
    """The documents of all files that `sources` name, read anew in each iteration.

    Files come in the order of `sources`, those of a folder (with its subfolders) sorted by path.
    Blank lines of JSON lines are skipped.
    """

    def __init__(self, sources: Sequence[Path], *, text_field: str = "text") -> None:
        """Finds the files; reads none.

        Raises:
            DataError: a source does not exist, has an unknown suffix or is a folder without text.
        """
        if not sources:
            raise DataError("sources: none given: name a text file or a folder that holds some.")
        self.sources = tuple(map(str, sources))
        self.files: list[SourceFile] = []
        for source in map(Path, sources):
            try:
                self.files += _find_files(source)
            except OSError as error:
                raise _unreadable(source, error) from error
        self.text_field = text_field

    def __iter__(self) -> Iterator[Document]:
        """Yields the documents.

        Raises:
            DataError: a file or a line cannot be read, named with the cause and the cure; or no
                document of all the files has text.
            MissingExtraError: a `.jsonl.zst` needs zstandard.
        """
        any_text = False
        for file in self.files:
            for document in _read_documents(file, self.text_field):
                any_text = any_text or bool(document.text)
                yield document
        if not any_text:
            raise DataError(
                f"{', '.join(self.sources)}: no document has text: every one is empty, or there "
                "is none."
            )


def _find_files(source: Path) -> list[SourceFile]:
    if source.is_dir():
        files = [
            SourceFile(path, path.relative_to(source).as_posix())
            for path in sorted(source.rglob("*"))
            if path.name.lower().endswith(_SUFFIXES) and path.is_file()
        ]
        if not files:
            raise DataError(
                f"{source}: the folder holds no text: files named *{', *'.join(_SUFFIXES)} are "
                "looked for in it and its subfolders."
            )
        return files
    if not source.exists():
        raise DataError(f"{source}: does not exist: check the path.")
    if not source.name.lower().endswith(_SUFFIXES):
        raise DataError(
            f"{source}: unknown suffix: files named *{', *'.join(_SUFFIXES)} can be read; "
            "rename or convert it."
        )
    return [SourceFile(source, source.name)]


def _read_documents(file: SourceFile, text_field: str) -> Iterator[Document]:
    if file.path.name.lower().endswith(TEXT_SUFFIXES):
        yield Document(file.name, _read_text(file.path))
        return
    for number, line in enumerate(_read_lines(file.path), start=1):
        if line.strip():
            text = _text_of_line(line, f"{file.path}, line {number}", text_field)
            yield Document(f"{file.name}:{number}", text)


@contextmanager
def _open(path: Path) -> Generator[BinaryIO, None, None]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_text(path: Path) -> str:
    with _open(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8")  # and no translation of line ends: text is kept to the byte
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{path}, line {line}", error) from error


def _read_lines(path: Path) -> Iterator[bytes]:
    with _open(path) as file:
        if path.name.lower().endswith(ZSTD_LINES_SUFFIX):
            yield from _split_lines(_unpack_zstd(path, file))
        else:
            yield from file


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []  # of a line that is not complete yet
    for chunk in chunks:
        head, *rest = chunk.split(b"\n")
        parts.append(head)
        for part in rest:
            yield b"".join(parts)
            parts = [part]
    yield b"".join(parts)


def _unpack_zstd(path: Path, file: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError("zstandard", "data") from error

    unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
    frame = None  # a file is any number of frames; stream_reader would not tell if one is cut off
    while packed := file.read(_ZSTD_CHUNK_BYTES):
        while packed:
            frame = frame or unpacker.decompressobj()
            try:
                yield frame.decompress(packed)
            except zstandard.ZstdError as error:
                raise DataError(
                    f"{path}: not readable as zstd ({error}): check it with `zstd --test`, "
                    "and copy or pack it again."
                ) from error
            packed = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise DataError(f"{path}: ends in the middle of a zstd frame: copy or pack it again.")


def _text_of_line(line: bytes, where: str, text_field: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not valid JSON ({error}): each line must hold one JSON object."
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: holds a value of type {type(record).__name__}: each line must hold one JSON "
            f"object with its text in the field {text_field!r}."
        )
    if text_field not in record:
        raise DataError(
            f"{where}: has no field {text_field!r}: set text_field to the one that holds the "
            f"text; {nearest(text_field, record)}"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: the field {text_field!r} holds a value of type {type(text).__name__}: "
            "it must hold a string."
        )
    return text


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: cannot be read ({error.strerror or error}): check that you may read it."
    )


def _not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{where}: not valid UTF-8 (byte 0x{error.object[error.start]:02x}, {error.reason}): "
        "convert the file with `iconv -f ITS_ENCODING -t UTF-8`."
    )
