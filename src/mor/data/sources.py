"""`SourceDocuments`: the documents of text files, JSON lines, tables and datasets.

Sources are `.txt` and other text files, `.jsonl`, `.jsonl.zst`, `.parquet`, folders of them,
folders saved by Hugging Face's `datasets`, and datasets on its hub. Every error names the file and,
where there is one, the line.
"""

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mor.data.hf_dataset import PREFIX, HubDataset, fetch
from mor.data.tabular import (
    PARQUET_SUFFIX,
    check_field,
    check_text,
    dataset_texts,
    is_saved_dataset,
    parquet_texts,
)
from mor.errors import DataError, MissingExtraError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")  # one document a file
LINES_SUFFIX = ".jsonl"  # one document a line
ZSTD_LINES_SUFFIX = ".jsonl.zst"
_SUFFIXES = (*TEXT_SUFFIXES, LINES_SUFFIX, ZSTD_LINES_SUFFIX, PARQUET_SUFFIX)

_ZSTD_MAX_WINDOW_BYTES = 2**27  # what `zstd --long=27` packs with
_ZSTD_CHUNK_BYTES = 2**16  # packed bytes at a time, so that unpacked ones stay few


@dataclass(frozen=True)
class Document:
    """One text: the unit that is held out or trained on, and that end-of-text ids separate."""

    name: str
    """Decides whether the document is held out, so it should not change from build to build."""
    text: str
    split: str | None = None
    """The split that its source was given for; None: `ValidationSplit` chooses."""

    def __post_init__(self) -> None:
        """Check the text.

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
    """A file, or a saved dataset's folder, and a name that does not depend on where it lies."""

    path: Path
    name: str
    split: str | None = None


@dataclass(frozen=True)
class _HubSource:
    """A dataset on the hub that has not been fetched."""

    dataset: HubDataset
    split: str | None


class SourceDocuments:
    """The documents of all files that `sources` name, read anew in each iteration.

    Files come in the order of `sources`, those of a folder (with its subfolders) sorted by path.
    Blank lines of JSON lines are skipped.
    """

    def __init__(
        self,
        sources: Sequence[Path | str],
        *,
        text_field: str = "text",
        valid: Sequence[Path | str] = (),
        hub_documents: int | None = None,
    ) -> None:
        """Find the files without reading them.

        Args:
            sources: files, folders, and hub datasets as `hf:OWNER/NAME:CONFIG@SPLIT`.
            text_field: the field or column that holds the text.
            valid: more sources, whose documents are all held out.
            hub_documents: the most documents to take of each dataset on the hub.

        Raises:
            ConfigError: `hf:` is followed by no dataset's name.
            DataError: a source does not exist, has an unknown suffix or is a folder without text.
        """
        if not sources:
            raise DataError("sources: none given: name a text file or a folder that holds some.")
        self.sources = tuple(map(str, (*sources, *valid)))
        self.text_field = text_field
        self._hub_documents = hub_documents
        self._places: list[SourceFile | _HubSource] = []
        for number, source in enumerate(self.sources):
            split = "valid" if number >= len(sources) else None
            if source.startswith(PREFIX):
                self._places.append(_HubSource(HubDataset.parse(source), split))
                continue
            try:
                found = _find_files(Path(source))
            except OSError as error:
                raise _unreadable(Path(source), error) from error
            self._places += [SourceFile(file.path, file.name, split) for file in found]
        self.counts: list[int] = []
        """Number of documents in each file that has been read to its end, from the first file."""

    @property
    def files(self) -> list[SourceFile]:
        """All files, in order; datasets on the hub come in only when they are fetched."""
        return [place for place in self._places if isinstance(place, SourceFile)]

    @property
    def on_hub(self) -> list[str]:
        """Names of the datasets on the hub that have not been fetched."""
        return [str(place.dataset) for place in self._places if isinstance(place, _HubSource)]

    def plan(self) -> list[list[Any]]:
        """The sources as plain data, with sizes and times: another plan means other documents."""
        plan: list[list[Any]] = []
        for place in self._places:
            if isinstance(place, _HubSource):
                plan.append([str(place.dataset), self._hub_documents, place.split])
                continue
            stat = place.path.stat()
            where = str(place.path.resolve())
            plan.append([where, place.name, place.split, stat.st_size, stat.st_mtime_ns])
        return plan

    def fetch(self, folder: Path) -> None:
        """Stream datasets of the hub into `folder`, and read those files from now on.

        Raises:
            DataError: a dataset cannot be loaded, has no such column, or a row holds no text.
            MissingExtraError: `datasets` or `zstandard` is not installed.
            OSError: the files cannot be written.
        """
        places: list[SourceFile | _HubSource] = []
        for number, place in enumerate(self._places):
            if isinstance(place, SourceFile):
                places.append(place)
                continue
            files = fetch(
                place.dataset,
                folder / str(number),
                text_field=self.text_field,
                max_documents=self._hub_documents,
            )
            name = str(place.dataset)
            places += [SourceFile(file, f"{name}/{file.name}", place.split) for file in files]
        self._places = places

    def __iter__(self) -> Iterator[Document]:
        """Yield all documents.

        Raises:
            DataError: a file, a line or a row cannot be read, named with the cause and the cure; or
                no document of all the files has text.
            MissingExtraError: a `.jsonl.zst` needs zstandard, tables need pyarrow or datasets.
        """
        any_text = False
        for document in self.after(0):
            any_text = any_text or bool(document.text)
            yield document
        if not any_text:
            raise DataError(
                f"{', '.join(self.sources)}: no document has text: every one is empty, or there "
                "is none."
            )

    def after(self, number: int) -> Iterator[Document]:
        """The documents without the first `number`; files whose `counts` are known are skipped.

        Raises:
            DataError: a file, a line or a row cannot be read, or a dataset has not been fetched.
            MissingExtraError: a `.jsonl.zst` needs zstandard, tables need pyarrow or datasets.
        """
        if self.on_hub:
            raise DataError(
                f"{self.on_hub[0]}: is on the hub: make a corpus of it with `mor data build`."
            )
        # `number` falls by the documents of each file, to those to skip in the files after it.
        for place, file in enumerate(self.files):
            if place < len(self.counts) and number >= self.counts[place]:
                number -= self.counts[place]
                continue
            count = 0
            for document in _read_documents(file, self.text_field):
                count += 1
                if count > number:
                    yield document
            number = max(0, number - count)
            if place == len(self.counts):
                self.counts.append(count)


def _find_files(source: Path) -> list[SourceFile]:
    """The files of one source; DataError if there is none that can be read."""
    if source.is_dir() and is_saved_dataset(source):
        return [SourceFile(source, source.name)]
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
        raise DataError(
            f"{source}: does not exist: check the path; a dataset of the Hugging Face hub is "
            "written hf:OWNER/NAME."
        )
    if not source.name.lower().endswith(_SUFFIXES):
        raise DataError(
            f"{source}: unknown suffix: files named *{', *'.join(_SUFFIXES)} can be read; "
            "rename or convert it."
        )
    return [SourceFile(source, source.name)]


def _read_documents(file: SourceFile, text_field: str) -> Iterator[Document]:
    name = file.path.name.lower()
    if name.endswith(TEXT_SUFFIXES):
        yield Document(file.name, _read_text(file.path), file.split)
    elif file.path.is_dir() or name.endswith(PARQUET_SUFFIX):
        read = dataset_texts if file.path.is_dir() else parquet_texts
        for number, text in enumerate(read(file.path, text_field), start=1):
            yield Document(f"{file.name}:{number}", text, file.split)
    else:
        for number, line in enumerate(_read_lines(file.path), start=1):
            if line.strip():
                text = _text_of_line(line, f"{file.path}, line {number}", text_field)
                yield Document(f"{file.name}:{number}", text, file.split)


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
    """The lines, without their ends, of bytes that come in chunks."""
    parts: list[bytes] = []  # of a line that is not complete yet
    for chunk in chunks:
        head, *rest = chunk.split(b"\n")
        parts.append(head)
        for part in rest:
            yield b"".join(parts)
            parts = [part]
    yield b"".join(parts)


def _unpack_zstd(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The unpacked content in chunks; DataError if it is damaged or cut off."""
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
            # What follows a frame's end is the next frame's start.
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
    check_field(where, text_field, record)
    return check_text(where, text_field, record[text_field])


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: cannot be read ({error.strerror or error}): check that you may read it."
    )


def _not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{where}: not valid UTF-8 (byte 0x{error.object[error.start]:02x}, {error.reason}): "
        "convert the file with `iconv -f ITS_ENCODING -t UTF-8`."
    )
