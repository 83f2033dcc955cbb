"""Texts of parquet files, and of folders that `save_to_disk` of Hugging Face's `datasets` wrote.

Every error names the file and, where there is one, the row, numbered from 1.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mor.errors import DataError, MissingExtraError, nearest

PARQUET_SUFFIX = ".parquet"
_BATCH_ROWS = 1000  # read at a time
_DATASET_FILE = "state.json"  # in a folder that a dataset was saved to
_DATASET_DICT_FILE = "dataset_dict.json"  # in one that a dictionary of splits was saved to


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of a dataset, or of a dictionary of them, has written this folder."""
    return (folder / _DATASET_FILE).is_file() or (folder / _DATASET_DICT_FILE).is_file()


def parquet_texts(path: Path, text_field: str) -> Iterator[str]:
    """The texts of a parquet file's rows, in order.

    Raises:
        DataError: it cannot be read, has no such column, or a row holds no text.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    try:
        with parquet.ParquetFile(path) as file:
            check_field(str(path), text_field, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=[text_field])
            columns = (batch.column(0).to_pylist() for batch in batches)
            yield from _checked(str(path), columns, text_field)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: not readable as parquet ({_first_line(error)}): copy or write it again."
        ) from error


def dataset_texts(folder: Path, text_field: str) -> Iterator[str]:
    """The texts of a saved dataset's rows, in order; of a dictionary of splits, those of `train`.

    Raises:
        DataError: it cannot be read, has no such column, or a row holds no text.
        MissingExtraError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "data") from error
    folder = _train_split(folder)
    try:
        rows: Any = datasets.load_from_disk(str(folder))
        check_field(str(folder), text_field, rows.column_names)
        rows = rows.select_columns([text_field])
        columns = (batch[text_field] for batch in rows.iter(batch_size=_BATCH_ROWS))
        yield from _checked(str(folder), columns, text_field)
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds for a damaged folder
        raise DataError(
            f"{folder}: not readable as a saved dataset ({_first_line(error)}): save it again "
            "with save_to_disk."
        ) from error


def _train_split(folder: Path) -> Path:
    """The folder itself if it holds one dataset, otherwise its split `train`."""
    if (folder / _DATASET_FILE).is_file():
        return folder
    try:
        splits = json.loads((folder / _DATASET_DICT_FILE).read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder / _DATASET_DICT_FILE}: not readable ({error}): save it again."
        ) from error
    if "train" not in splits:
        raise DataError(
            f"{folder}: holds the splits {', '.join(splits)} but no train: name the folder of the "
            f"one to read, such as {folder / splits[0]}."
        )
    return folder / "train"


def check_field(where: str, text_field: str, known: Iterable[str]) -> None:
    """Raise DataError if a table has no column of this name."""
    names = list(known)
    if text_field not in names:
        raise DataError(
            f"{where}: has no field {text_field!r}: set text_field to the one that holds the "
            f"text; {nearest(text_field, names)}"
        )


def check_text(where: str, text_field: str, value: object) -> str:
    """Return the value if it is a string, raise DataError if not."""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: the field {text_field!r} holds a value of type {type(value).__name__}: "
            "it must hold a string."
        )
    return value


def _checked(where: str, columns: Iterable[Iterable[object]], text_field: str) -> Iterator[str]:
    """The values of batches of one column, each checked to be a string."""
    number = 0
    for column in columns:
        for value in column:
            number += 1
            yield check_text(f"{where}, row {number}", text_field, value)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
