"""Datasets of the Hugging Face hub, streamed into local files before a corpus is built of them.

A build reads its documents twice and may be cut off at any time, so it reads local copies:
`000000.jsonl.zst` and so on, of 10,000 documents each. A fetch that was cut off goes on after the
last of them.
"""

import json
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mor.data.tabular import check_field, check_text
from mor.errors import ConfigError, DataError, MissingExtraError
from mor.io.atomic_files import write_file

PREFIX = "hf:"
_FORM = re.compile(r"hf:(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")
_FILE_DOCUMENTS = 10_000  # in each file but the last
_COMPLETE_FILE = "complete.json"  # written when the last file is there


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset on the hub."""

    name: str
    config: str | None
    split: str

    @classmethod
    def parse(cls, text: str) -> "HubDataset":
        """Parse `hf:OWNER/NAME`, `hf:OWNER/NAME:CONFIG`, `hf:OWNER/NAME@SPLIT` or all three.

        Raises:
            ConfigError: another form.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"{text!r} names no dataset: write hf:OWNER/NAME, hf:OWNER/NAME:CONFIG or "
                "hf:OWNER/NAME:CONFIG@SPLIT (the split is train unless given)."
            )
        return cls(found["name"], found["config"], found["split"] or "train")

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"{PREFIX}{self.name}{config}@{self.split}"


def fetch(
    dataset: HubDataset, folder: Path, *, text_field: str, max_documents: int | None = None
) -> list[Path]:
    """Stream the texts into `folder` as `.jsonl.zst`, going on where an earlier call was cut off.

    Args:
        text_field: the column that holds the text, and the field in the files.
        max_documents: the most documents to take; None: all.

    Returns:
        The files in order.

    Raises:
        DataError: the dataset cannot be loaded, has no such column, or a row holds no text.
        MissingExtraError: `datasets` or `zstandard` is not installed.
        OSError: the files cannot be written.
    """
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError("zstandard", "data") from error
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.glob("*.jsonl.zst"))
    if (folder / _COMPLETE_FILE).is_file():
        return files
    # Files appear whole (`write_file`), and only the last one may hold fewer.
    done = len(files) * _FILE_DOCUMENTS
    rows = _rows(dataset, text_field, done, max_documents)
    while True:  # one file per turn; a short one, which may be empty, is the last
        texts = _next_texts(dataset, rows, text_field, done)
        if texts:
            data = "".join(json.dumps({text_field: text}) + "\n" for text in texts)
            file = folder / f"{len(files):06d}.jsonl.zst"
            write_file(file, zstandard.ZstdCompressor().compress(data.encode()))
            files.append(file)
            done += len(texts)
        if len(texts) < _FILE_DOCUMENTS:
            write_file(folder / _COMPLETE_FILE, json.dumps({"documents": done}).encode())
            return files


def _rows(dataset: HubDataset, text_field: str, skip: int, maximum: int | None) -> Any:
    """An iterator over the dataset's rows from number `skip` on, up to number `maximum`."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "data") from error
    try:
        stream: Any = datasets.load_dataset(
            dataset.name, dataset.config, split=dataset.split, streaming=True
        )
        if stream.column_names is not None:
            check_field(str(dataset), text_field, stream.column_names)
            stream = stream.select_columns([text_field])
        rows = iter(stream.skip(skip) if skip else stream)
    except DataError:
        raise
    except Exception as error:  # the library and those below it raise many kinds
        raise _unreachable(dataset, error) from error
    return rows if maximum is None else islice(rows, max(0, maximum - skip))


def _next_texts(dataset: HubDataset, rows: Any, text_field: str, done: int) -> list[str]:
    """The texts of the next file; fewer than 10,000 at the end.

    Args:
        done: rows before them, for the row numbers in messages.
    """
    texts: list[str] = []
    try:
        for row in islice(rows, _FILE_DOCUMENTS):
            where = f"{dataset}, row {done + len(texts) + 1}"
            check_field(where, text_field, row)
            texts.append(check_text(where, text_field, row[text_field]))
    except DataError:
        raise
    except Exception as error:
        raise _unreachable(dataset, error) from error
    return texts


def _unreachable(dataset: HubDataset, error: Exception) -> DataError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return DataError(
        f"{dataset}: cannot be read from the hub ({reason}): check name, configuration, split and "
        "network; a build that was cut off goes on where it was."
    )
