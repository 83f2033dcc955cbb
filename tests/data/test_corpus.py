"""Building a corpus: every document once, held out by name, and what is refused."""

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mor.data import corpus, encoding
from mor.data.batches import TokenShards
from mor.data.corpus import Document, build_corpus, build_from_documents
from mor.data.validation_split import ValidationSplit
from mor.errors import ConfigError, DataError, MorError
from mor.io.tokenizer import Tokenizer

WORDS = ("recursion", "router", "depth", "token", "lane", "page", "block", "capacity")
TEXTS = [f"{a} {b}\n  {b}{a}: {len(a)}" for a in WORDS for b in WORDS]
DOCUMENTS = [Document(f"doc{number}", text) for number, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tokenizer.train(TEXTS, 300).save(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Paths of new corpora, also inside the examples of a property."""
    return lambda: tmp_path_factory.mktemp("corpus") / "out"


def read_split(folder: Path, split: str) -> list[list[int]]:
    """The token ids of each document, found by the document starts, without `TokenShards`."""
    index = json.loads((folder / "index.json").read_text())
    documents: list[list[int]] = []
    for entry in index["splits"][split]:
        data = (folder / entry["file"]).read_bytes()
        tokens = np.frombuffer(data, index["dtype"])
        starts = np.load(folder / entry["file"].replace(".bin", ".docs.npy"))
        assert starts.dtype == np.int64
        assert starts[0] == 0
        assert (entry["num_tokens"], entry["crc32"]) == (len(tokens), zlib.crc32(data))
        assert entry["num_documents"] == len(starts)
        documents += [part.tolist() for part in np.split(tokens, starts[1:])]
    return documents


def texts_of(folder: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.load(folder)
    documents = read_split(folder, split)
    assert all(
        ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1] for ids in documents
    )
    return [tokenizer.decode(ids[:-1]) for ids in documents]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is written


def test_text_files_become_shards_that_hold_every_document_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text(TEXTS[0])
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[1:40])
    (source / "b.jsonl").write_text(rows)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[40:])
    (source / "c.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    (source / "empty.txt").write_text("")

    summary = build_corpus([source], tmp_path / "out", train_tokenizer=300, valid_fraction=0.2)

    train, valid = (texts_of(summary.path, split) for split in ("train", "valid"))
    assert sorted(train + valid) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text not in valid]  # in the order of the sources
    assert len(valid) > 1
    shards = {split: TokenShards.open(summary.path, split) for split in ("train", "valid")}
    assert summary == corpus.CorpusSummary(
        path=tmp_path / "out",
        vocab_size=Tokenizer.load(tmp_path / "out").vocab_size,
        num_train_documents=len(train),
        num_valid_documents=len(valid),
        num_train_tokens=shards["train"].num_tokens,
        num_valid_tokens=shards["valid"].num_tokens,
        num_shards=2,
        num_empty_documents=1,
    )
    assert shards["train"].num_documents == len(train)
    assert shards["train"].vocab_size == summary.vocab_size
    assert sorted(contents(tmp_path / "out")) == [
        "index.json",
        "tokenizer.json",
        "train-00000.bin",
        "train-00000.docs.npy",
        "valid-00000.bin",
        "valid-00000.docs.npy",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_building_is_deterministic(tmp_path: Path) -> None:
    for name in ("first", "second"):
        build_from_documents(DOCUMENTS, tmp_path / name, train_tokenizer=300, shard_tokens=200)
    first = contents(tmp_path / "first")
    assert len(first) > 6
    assert first == contents(tmp_path / "second")


def test_a_given_tokenizer_is_used_and_copied(tmp_path: Path, tokenizer_file: Path) -> None:
    for name, tokenizer in (("a", tokenizer_file), ("b", tokenizer_file.parent)):
        build_from_documents(DOCUMENTS[:5], tmp_path / name, tokenizer=tokenizer)
        written = Tokenizer.load(tmp_path / name)
        assert written.to_json() == Tokenizer.load(tokenizer_file).to_json()


@settings(deadline=None, max_examples=40)
@given(texts=st.lists(st.text(), min_size=1, max_size=20), shard_tokens=st.integers(1, 60))
def test_any_documents_survive_in_shards_of_any_size(
    scratch: Callable[[], Path], tokenizer_file: Path, texts: list[str], shard_tokens: int
) -> None:
    if not any(texts):
        texts = [*texts, "x"]
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    summary = build_from_documents(
        iter(documents),
        scratch(),
        tokenizer=tokenizer_file,
        valid_fraction=0.3,
        shard_tokens=shard_tokens,
    )
    written = texts_of(summary.path, "train") + texts_of(summary.path, "valid")
    assert sorted(written) == sorted(filter(None, texts))
    assert summary.num_empty_documents == texts.count("")
    index = json.loads((summary.path / "index.json").read_text())
    for split, shards in index["splits"].items():
        lengths = [len(ids) for ids in read_split(summary.path, split)]
        assert sum(lengths) == sum(shard["num_tokens"] for shard in shards)
        # Every shard but the last is full, and none goes on once it is.
        assert all(shard["num_tokens"] >= shard_tokens for shard in shards[:-1])
        assert all(shard["num_tokens"] < shard_tokens + max(lengths) for shard in shards)


def test_a_large_vocabulary_takes_wider_tokens(tmp_path: Path, tokenizer_file: Path) -> None:
    fields = json.loads(tokenizer_file.read_text())
    vocab = fields["model"]["vocab"]
    vocab["x" * 9] = vocab.pop("r")  # keep the ids, move one past 2**16
    vocab["r"] = 70_000
    fields["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    texts = ["router", "tau"]
    documents = [Document(text, text) for text in texts]
    build_from_documents(documents, tmp_path / "out", tokenizer=tmp_path)
    assert json.loads((tmp_path / "out" / "index.json").read_text())["dtype"] == "uint32"
    written = texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "valid")
    assert sorted(written) == texts
    tokens = [
        TokenShards.open(tmp_path / "out", split).window(0, 3) for split in ("train", "valid")
    ]
    assert 70_000 in np.concatenate(tokens)


@settings(deadline=None, max_examples=60)
@given(text=st.text("ab1_ \n\t.'é茶", max_size=200), segment=st.integers(1, 12))
def test_long_documents_have_the_same_tokens_as_in_one_go(
    tokenizer_file: Path, text: str, segment: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_SEGMENT_CHARACTERS", segment)
        segments = list(encoding._segments(Document("long", text), 0))
    assert "".join(part.text for part in segments) == text
    assert [part.is_last for part in segments] == [False] * (len(segments) - 1) + [True]
    tokenizer = Tokenizer.load(tokenizer_file)
    ids = [token for part in segments for token in tokenizer.encode(part.text)]
    assert ids == tokenizer.encode(text)


def test_batches_and_segments_leave_no_trace(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [*DOCUMENTS, Document("long", " ".join(TEXTS))]
    build_from_documents(documents, tmp_path / "whole", tokenizer=tokenizer_file)
    monkeypatch.setattr(encoding, "_SEGMENT_CHARACTERS", 16)
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 100)
    monkeypatch.setattr(encoding, "_BATCH_TEXTS", 7)
    seen: list[tuple[int, int]] = []
    build_from_documents(
        documents,
        tmp_path / "parts",
        tokenizer=tokenizer_file,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(list(encoding._segments(documents[-1], 0))) > 10
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    assert len(seen) > 10
    assert seen == sorted(seen)
    assert seen[-1] == (len(documents), len(documents))


# The split


@settings(deadline=None, max_examples=100)
@given(
    num_documents=st.integers(2, 30),
    fraction=st.floats(0.0, 1.0, exclude_min=True, exclude_max=True),
    seed=st.integers(),
    same_name=st.booleans(),
)
def test_both_splits_get_a_document(
    num_documents: int, fraction: float, seed: int, same_name: bool
) -> None:
    names = ["same" if same_name else f"doc{number}" for number in range(num_documents)]
    documents = [Document(name, "text") for name in names]
    validation_split = ValidationSplit(fraction, seed)
    assert list(validation_split.survey(documents)) == ["text"] * num_documents
    splits = [
        validation_split.split_of(number, document) for number, document in enumerate(documents)
    ]
    assert {"train", "valid"} == set(splits)


def test_the_share_is_about_what_was_asked_and_goes_by_name() -> None:
    documents = [Document(f"file:{number}", "x") for number in range(5000)]
    chosen = []
    for order, seed in ((documents, 0), (documents[::-1], 0), (documents, 1)):
        validation_split = ValidationSplit(0.1, seed)
        assert (
            sum(1 for _ in validation_split.survey(order)) == validation_split.num_documents == 5000
        )
        splits = [
            validation_split.split_of(number, document) for number, document in enumerate(order)
        ]
        chosen.append({d.name for d, split in zip(order, splits, strict=True) if split == "valid"})
        assert 400 < len(chosen[-1]) < 600
    assert chosen[0] == chosen[1]
    assert len(chosen[0] & chosen[2]) < 100


@pytest.mark.parametrize(
    ("num_documents", "fraction", "num_valid"), [(1, 0.5, 0), (50, 0.0, 0), (2, 0.001, 1)]
)
def test_small_splits(
    tmp_path: Path, tokenizer_file: Path, num_documents: int, fraction: float, num_valid: int
) -> None:
    summary = build_from_documents(
        DOCUMENTS[:num_documents],
        tmp_path / "out",
        tokenizer=tokenizer_file,
        valid_fraction=fraction,
    )
    assert summary.num_valid_documents == num_valid == len(texts_of(summary.path, "valid"))
    assert summary.num_train_documents == num_documents - num_valid
    if not num_valid:
        with pytest.raises(DataError, match="no documents in the split 'valid'"):
            TokenShards.open(summary.path, "valid")


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokenizer": None}, ConfigError, "train_tokenizer: None: give one of the two"),
        ({"train_tokenizer": 300}, ConfigError, "train_tokenizer: 300: give one of the two"),
        ({"tokenizer": None, "train_tokenizer": 9}, ConfigError, "vocab_size: 9 is too small"),
        ({"valid_fraction": 1.0}, ConfigError, r"valid_fraction: 1\.0 is not in"),
        ({"valid_fraction": -0.1}, ConfigError, r"valid_fraction: -0\.1 is not in"),
        ({"valid_fraction": float("nan")}, ConfigError, "valid_fraction: nan is not in"),
        ({"shard_tokens": 0}, ConfigError, "shard_tokens: 0 is not a positive number"),
        ({"tokenizer": Path("nowhere.json")}, DataError, r"nowhere\.json: there is no tokenizer"),
        ({"documents": []}, DataError, "no document has text"),
        ({"documents": [Document("a", "")]}, DataError, "no document has text"),
    ],
)
def test_impossible_options_are_refused(
    tmp_path: Path,
    tokenizer_file: Path,
    options: dict[str, Any],
    error: type[MorError],
    message: str,
) -> None:
    arguments = {"documents": DOCUMENTS, "tokenizer": tokenizer_file} | options
    with pytest.raises(error, match=message):
        build_from_documents(out=tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_an_end_of_text_is_named(tmp_path: Path, tokenizer_file: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(tokenizer_file.read_text().replace("<|endoftext|>", "<other>"))
    with pytest.raises(DataError, match=r"mine\.json: the tokenizer has no end-of-text token"):
        build_from_documents(DOCUMENTS, tmp_path / "out", tokenizer=file)
    assert not (tmp_path / "out").exists()


def test_a_bad_line_stops_the_build_before_anything_is_written(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    good = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(good + "{oops\n")
    for options in ({"tokenizer": tokenizer_file}, {"train_tokenizer": 300}):
        with pytest.raises(DataError, match=rf"a\.jsonl, line {len(TEXTS) + 1}: not valid JSON"):
            build_corpus([tmp_path / "a.jsonl"], tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_text_that_is_not_unicode_names_the_document() -> None:
    with pytest.raises(DataError, match="document 'here': not valid Unicode"):
        Document("here", "\ud800")


def test_sources_that_change_while_they_are_read_are_refused(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    class Shrinking:
        documents = DOCUMENTS

        def __iter__(self) -> Iterator[Document]:
            documents, self.documents = self.documents, self.documents[:-1]
            return iter(documents)

    message = rf"held {len(DOCUMENTS)} documents and then {len(DOCUMENTS) - 1}: build again"
    with pytest.raises(DataError, match=message):
        build_from_documents(Shrinking(), tmp_path / "out", tokenizer=tokenizer_file)
    assert list(tmp_path.iterdir()) == []
