"""Parquet files, saved datasets and datasets on the hub, and every complaint with its row."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from mor.data import hf_dataset as hub
from mor.data.batches import TokenShards
from mor.data.corpus import build_corpus
from mor.data.hf_dataset import HubDataset
from mor.data.sources import SourceDocuments
from mor.errors import ConfigError, DataError, MissingExtraError

TEXTS = [f"text number {i}, é茶" for i in range(25)]


def read(*sources: Path | str, text_field: str = "text") -> list[tuple[str, str]]:
    documents = SourceDocuments(sources, text_field=text_field)
    return [(document.name, document.text) for document in documents]


def write_parquet(file: Path, texts: list[Any], name: str = "text", **options: Any) -> Path:
    parquet.write_table(pa.table({"id": list(range(len(texts))), name: texts}), file, **options)
    return file


def save_dataset(folder: Path, rows: dict[str, list[Any]]) -> Path:
    datasets.Dataset.from_dict(rows).save_to_disk(str(folder))
    return folder


# Parquet and saved datasets


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    write_parquet(tmp_path / "rows" / "a.parquet", TEXTS, row_group_size=7, compression="zstd")
    write_parquet(tmp_path / "rows" / "b.PARQUET", ["", "last"])
    expected = [(f"a.parquet:{n}", text) for n, text in enumerate(TEXTS, start=1)]
    assert read(tmp_path / "rows") == [*expected, ("b.PARQUET:1", ""), ("b.PARQUET:2", "last")]
    write_parquet(tmp_path / "c.parquet", ["x"], name="body")
    assert read(tmp_path / "c.parquet", text_field="body") == [("c.parquet:1", "x")]


def test_rows_of_saved_datasets_are_documents(tmp_path: Path) -> None:
    one = save_dataset(tmp_path / "one", {"text": TEXTS, "id": list(range(25))})
    assert read(one) == [(f"one:{n}", text) for n, text in enumerate(TEXTS, start=1)]
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "other")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
    assert read(tmp_path / "both") == [("both:1", "train")]
    assert read(tmp_path / "both" / "other") == [("other:1", "other")]
    datasets.DatasetDict({"test": splits["other"]}).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"holds the splits test but no train: .*/none/test"):
        read(tmp_path / "none")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["good", None], "row 2: the field 'text' holds a value of type NoneType"),
        ([1, 2], "row 1: the field 'text' holds a value of type int: it must hold a string"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, texts: list[Any], message: str) -> None:
    file = write_parquet(tmp_path / "a.parquet", texts)
    with pytest.raises(DataError, match=rf"{file}, {message}"):
        read(file)
    folder = save_dataset(tmp_path / "saved", {"text": texts})
    with pytest.raises(DataError, match=rf"{folder}, {message}"):
        read(folder)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", ["x"], name="texts")
    folder = save_dataset(tmp_path / "saved", {"texts": ["x"]})
    for source in (file, folder):
        with pytest.raises(DataError, match=rf"{source}: has no field 'text'.*'texts'\?"):
            read(source)


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", TEXTS)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match=rf"{file}: not readable as parquet .*copy or write"):
        read(file)
    folder = save_dataset(tmp_path / "saved", {"text": TEXTS})
    next(folder.glob("*.arrow")).unlink()
    with pytest.raises(DataError, match=rf"{folder}: not readable as a saved dataset"):
        read(folder)
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset_dict\.json: not readable"):
        read(tmp_path / "both")


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "a.parquet", TEXTS)
    folder = save_dataset(tmp_path / "saved", {"text": TEXTS})
    for package, source in (("pyarrow", file), ("datasets", folder), ("datasets", "hf:a/b")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingExtraError, match=rf"{package} .*recursions\[data\]"):
                build_corpus([source], tmp_path / "out", train_tokenizer=300)


# The hub


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:owner/name", ("owner/name", None, "train")),
        ("hf:squad", ("squad", None, "train")),
        ("hf:owner/na-me:conf.ig@valid", ("owner/na-me", "conf.ig", "valid")),
        ("hf:owner/name@test", ("owner/name", None, "test")),
    ],
)
def test_names_on_the_hub(text: str, expected: tuple[str, str | None, str]) -> None:
    dataset = HubDataset.parse(text)
    assert (dataset.name, dataset.config, dataset.split) == expected
    assert HubDataset.parse(str(dataset)) == dataset


@pytest.mark.parametrize("text", ["hf:", "hf:a/b/c", "hf:a/b@", "hf:a b", "hf://a/b"])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"names no dataset: write hf:OWNER/NAME"):
        SourceDocuments([text])


def test_what_is_not_fetched_is_not_read() -> None:
    with pytest.raises(DataError, match=r"hf:o/n@train: is on the hub: make a corpus of it"):
        list(SourceDocuments(["hf:o/n"]))


class FakeHub:
    """Stands for `datasets.load_dataset`: 25 documents, a line that may break, and a count."""

    column_names: Any = None

    def __init__(self, breaks_after: int | None = None) -> None:
        self.breaks_after, self.sent, self.start = breaks_after, 0, 0
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        self.calls.append((name, config, split, streaming))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist\non the Hub")
        return self

    def skip(self, number: int) -> Any:
        self.start = number
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.start, len(TEXTS)):
            if self.breaks_after is not None and self.sent >= self.breaks_after:
                raise ConnectionError("the line is down")
            self.sent += 1
            yield {"text": TEXTS[number], "id": number}


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_FILE_DOCUMENTS", 4)


@pytest.mark.usefixtures("small_files")
def test_a_dataset_on_the_hub_becomes_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the line breaks twice: what has come is not asked for again."""
    whole = FakeHub()
    monkeypatch.setattr(datasets, "load_dataset", whole)
    build_corpus(["hf:o/n:c@s"], tmp_path / "whole", train_tokenizer=300, valid_fraction=0.2)
    assert whole.calls == [("o/n", "c", "s", True)]
    assert sum(TokenShards.open(tmp_path / "whole", s).num_documents for s in ("train", "valid"))
    for after, left in ((10, 17), (13, 5), (None, 0)):
        line = FakeHub(breaks_after=after)
        monkeypatch.setattr(datasets, "load_dataset", line)
        options: dict[str, Any] = {"train_tokenizer": 300, "valid_fraction": 0.2}
        if after is None:
            build_corpus(["hf:o/n:c@s"], tmp_path / "cut", **options)
            assert line.sent == 5
        else:
            with pytest.raises(DataError, match=r"hf:o/n:c@s: cannot be read .*the line is down"):
                build_corpus(["hf:o/n:c@s"], tmp_path / "cut", **options)
            assert len(TEXTS) - line.start - line.sent // 4 * 4 == left
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("maximum", [3, 8, 11, 99])
def test_so_many_documents_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maximum: int
) -> None:
    fake = FakeHub()
    monkeypatch.setattr(datasets, "load_dataset", fake)
    files = hub.fetch(
        HubDataset.parse("hf:o/n"), tmp_path, text_field="text", max_documents=maximum
    )
    texts = [text for file in files for _, text in read(file)]
    assert texts == TEXTS[:maximum]
    assert fake.sent == len(texts)
    assert hub.fetch(HubDataset.parse("hf:o/n"), tmp_path, text_field="text") == files


@pytest.mark.parametrize(
    ("source", "field", "words"),
    [
        (
            "hf:no/such",
            "text",
            r"hf:no/such@train: cannot be read from the hub .*'no/such' doesn't",
        ),
        ("hf:o/n", "body", r"hf:o/n@train, row 1: has no field 'body'"),
        ("hf:o/n", "id", r"hf:o/n@train, row 1: the field 'id' holds a value of type int"),
    ],
)
def test_what_the_hub_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, field: str, words: str
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", FakeHub())
    with pytest.raises(DataError, match=words):
        build_corpus([source], tmp_path / "out", train_tokenizer=300, text_field=field)


def test_columns_are_looked_at_before_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library's own streams, made from a local dataset."""
    saved = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(25))})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: saved.to_iterable_dataset())
    with pytest.raises(DataError, match=r"hf:o/n@train: has no field 'texts'.*did you mean 'text'"):
        hub.fetch(HubDataset.parse("hf:o/n"), tmp_path / "a", text_field="texts")
    files = hub.fetch(HubDataset.parse("hf:o/n"), tmp_path / "b", text_field="text")
    assert [text for file in files for _, text in read(file)] == TEXTS


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
