"""Datasets of the Hugging Face hub, streamed into local files before a corpus is built of them.

A build reads its documents twice and may be cut off at any time; the hub is asked once. Documents
are kept in packed files of 10,000; a fetch that was cut off skips those that are there.
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
_CHUNK = 10_000  # documents in a file
_DONE = "complete.json"


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset on the hub."""

    name: str
    config: str | None
    split: str

    @classmethod
    def parse(cls, text: str) -> "HubDataset":
        """Read `hf:OWNER/NAME`, `hf:OWNER/NAME:CONFIG`, `hf:OWNER/NAME@SPLIT` or all three.

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
    if (folder / _DONE).is_file():
        return files
    done = len(files) * _CHUNK
    rows = _rows(dataset, text_field, done, max_documents)
    while True:
        texts = _next(dataset, rows, text_field, done)
        if texts:
            data = "".join(json.dumps({text_field: text}) + "\n" for text in texts)
            file = folder / f"{len(files):06d}.jsonl.zst"
            write_file(file, zstandard.ZstdCompressor().compress(data.encode()))
            files.append(file)
            done += len(texts)
        if len(texts) < _CHUNK:
            write_file(folder / _DONE, json.dumps({"documents": done}).encode())
            return files


def _rows(dataset: HubDataset, text_field: str, skip: int, maximum: int | None) -> Any:
    """An iterator over the dataset's rows, without the first ones."""
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


def _next(dataset: HubDataset, rows: Any, text_field: str, done: int) -> list[str]:
    """The texts of the next file; fewer than it can hold at the end."""
    texts: list[str] = []
    try:
        for row in islice(rows, _CHUNK):
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
