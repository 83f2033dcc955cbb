"""`mor data build` and `mor data info`."""

import json
import shutil
from pathlib import Path

import pytest
from cli_helpers import Mor, TinyRun, one_sentence

from mor.data.batches import TokenShards


def table(out: str) -> dict[str, list[int]]:
    """The numbers of each split in what was printed."""
    rows = [line.split() for line in out.splitlines() if line.startswith(("train ", "valid "))]
    return {split: [int(n.replace(",", "")) for n in numbers] for split, *numbers in rows}


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Nine documents and an empty one as JSON lines, in the field `body`."""
    file = tmp_path / "text.jsonl"
    texts = [f"number {i} " + "é🙂 " * 40 for i in range(9)]
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in [*texts, ""]))
    return file


def test_build_says_what_it_wrote_and_what_comes_next(mor: Mor, lines: Path) -> None:
    out = lines.parent / "corpus"
    called = mor(
        *("data", "build", lines, "--out", out, "--train-tokenizer", 270, "--text-field", "body"),
        *("--valid-fraction", 0.3, "--shard-tokens", 100, "--seed", 3),
    )
    assert (called.status, called.err) == (0, "")
    counts = table(called.out)
    for split in ("train", "valid"):
        shards = TokenShards.open(out, split)
        files = len(list(out.glob(f"{split}-*.bin")))
        assert counts[split] == [shards.num_documents, shards.num_tokens, files]
    assert counts["train"][0] + counts["valid"][0] == 9
    assert counts["train"][2] > 1
    assert "vocabulary 2" in called.out
    assert "left out: 1 documents" in called.out
    assert f"mor train configs/135m-mor3.yaml --data {out}" in called.out.splitlines()[-1]

    again = mor("data", "info", out)
    assert (again.status, again.err) == (0, "")
    assert table(again.out) == counts


def test_build_uses_a_given_tokenizer(mor: Mor, tiny: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    assert mor("data", "build", tiny.text, "--out", out, "--tokenizer", tiny.corpus).status == 0
    assert (out / "tokenizer.json").read_text() == (tiny.corpus / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    "options", [[], ["--train-tokenizer", 300, "--tokenizer", "tokenizer.json"]]
)
def test_build_needs_one_tokenizer(mor: Mor, tiny: TinyRun, options: list[object]) -> None:
    called = mor("data", "build", tiny.text, "--out", "never", *options)
    message = one_sentence(called, status=1)
    assert "--tokenizer PATH" in message
    assert "--train-tokenizer VOCAB" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--train-tokenizer", 100], ["100", "257"]),
        (["--tokenizer", "no-such.json"], ["no-such.json"]),
        (["--train-tokenizer", 300, "--valid-fraction", 1.5], ["valid_fraction", "1.5"]),
        (["--train-tokenizer", 300, "--shard-tokens", 0], ["shard_tokens", "0"]),
    ],
)
def test_bad_options_are_named(
    mor: Mor, tiny: TinyRun, tmp_path: Path, options: list[object], words: list[str]
) -> None:
    out = tmp_path / "out"
    message = one_sentence(mor("data", "build", tiny.text, "--out", out, *options), status=1)
    assert all(word in message for word in words)
    assert not out.exists()


def test_build_overwrites_only_if_told_to(mor: Mor, tiny: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    shutil.copytree(tiny.corpus, out)
    args = ("data", "build", tiny.text / "00.txt", "--out", out, "--train-tokenizer", 260)
    before = (out / "index.json").read_bytes()
    assert "overwrite" in one_sentence(mor(*args), status=1)
    assert (out / "index.json").read_bytes() == before
    assert mor(*args, "--overwrite").status == 0
    assert (out / "index.json").read_bytes() != before


def test_a_missing_source_is_named(mor: Mor, tmp_path: Path) -> None:
    called = mor("data", "build", "no-such.txt", "--out", tmp_path, "--train-tokenizer", 300)
    assert "no-such.txt" in one_sentence(called, status=1)


def test_info_names_a_damaged_shard(mor: Mor, tiny: TinyRun, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny.corpus, corpus)
    shard = corpus / "valid-00000.bin"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    assert "valid-00000.bin" in one_sentence(mor("data", "info", corpus), status=1)


def test_info_of_no_corpus(mor: Mor, tmp_path: Path) -> None:
    assert str(tmp_path) in one_sentence(mor("data", "info", tmp_path), status=1)


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_data_alone_lists_its_verbs(mor: Mor, args: list[str]) -> None:
    status, out, err = mor("data", *args)
    assert (status, err) == (0, "")
    assert "  build " in out
    assert "  info " in out
