"""Builds that are cut off, and builds by many processes: the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mor.data import corpus, encoding
from mor.data import sources as sources_module
from mor.data import writer as writing
from mor.data.batches import TokenShards
from mor.data.build_journal import Journal
from mor.data.corpus import build_corpus
from mor.errors import CapacityError, ConfigError, DataError
from mor.io.tokenizer import Tokenizer

SCRIPT = """
import os, signal, sys
from mor.data import corpus
from mor.data import encoding
from mor.data import writer as writing
from mor.data import sources as sources_module
writing._STATE_TOKENS, encoding._BATCH_CHARACTERS = 300, 400
left = int(sys.argv[3])
def progress(done, total):
    if done == left:
        os.kill(os.getpid(), signal.SIGKILL)
corpus.build_corpus([sys.argv[1]], sys.argv[2], train_tokenizer=300, valid_fraction=0.1,
    shard_tokens=900, progress=progress)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files of 240 documents in all, some without text."""
    folder, draw = tmp_path_factory.mktemp("sources"), random.Random(0)
    words = ["recursion", "router", "depth", "token", "lane", "page", "block", "capacity"]
    for name in "abcd":
        texts = [" ".join(draw.choices(words, k=draw.randrange(30))) for _ in range(60)]
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(rows)
    return folder


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_STATE_TOKENS", 300)
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 400)


OPTIONS: dict[str, Any] = {"train_tokenizer": 300, "valid_fraction": 0.1, "shard_tokens": 900}


def cut_off(sources: Path, out: Path, after: int) -> list[int]:
    """Interrupt a build after so many documents; the documents that it encoded."""
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_corpus([sources], out, progress=progress, **OPTIONS)
    return seen


@pytest.mark.usefixtures("small_steps")
def test_an_interrupted_build_goes_on(sources: Path, tmp_path: Path) -> None:
    """Anywhere, any number of times; nothing before the last state is encoded again."""
    whole = build_corpus([sources], tmp_path / "whole", **OPTIONS)
    total = whole.num_train_documents + whole.num_valid_documents
    assert whole.num_shards > 5
    out, starts = tmp_path / "out", []
    for after in (1, 20, 21, 90, 150, total - 1):
        starts.append(cut_off(sources, out, after)[0])
        assert not out.exists()
        assert (tmp_path / "out.partial" / "journal.jsonl").is_file()
    assert starts[:2] == [1, 1]
    assert 70 < starts[4] <= 91
    assert 130 < starts[5] <= 151
    seen: list[int] = []
    options = OPTIONS | {"progress": lambda done, total: seen.append(done)}
    resumed = build_corpus([sources], out, **options)
    assert total - 20 < seen[0] <= total
    assert contents(out) == contents(tmp_path / "whole")
    assert resumed == corpus.CorpusSummary(**(vars(whole) | {"path": out}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_files_that_are_done_are_not_opened_again(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_STATE_TOKENS", 1)
    total = cut_off(sources, tmp_path / "out", 200)[-1]
    assert total == 200
    opened: list[str] = []
    real = sources_module._read_documents
    spy = lambda file, field: opened.append(file.name) or real(file, field)  # noqa: E731
    monkeypatch.setattr(sources_module, "_read_documents", spy)
    build_corpus([sources], tmp_path / "out", **OPTIONS)
    assert opened == ["d.jsonl"]


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("damage", ["tail", "shard", "lost"])
def test_a_journal_that_was_cut_off_or_lost_its_shards(
    sources: Path, tmp_path: Path, damage: str
) -> None:
    build_corpus([sources], tmp_path / "whole", **OPTIONS)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    cut_off(sources, out, 150)
    if damage == "tail":
        with (partial / "journal.jsonl").open("a") as file:
            file.write('{"state": {"docu')
    elif damage == "shard":
        newest = max((partial / "corpus").glob("train-*.bin"))
        newest.write_bytes(newest.read_bytes()[:10])
        with pytest.raises(DataError, match=rf"{newest.name}: not what the journal .*remove"):
            build_corpus([sources], out, **OPTIONS)
        return
    else:
        (partial / "corpus").rename(tmp_path / "elsewhere")
    build_corpus([sources], out, **OPTIONS)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.usefixtures("small_steps")
def test_another_plan_starts_anew(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for changes in ({"seed": 1}, {"shard_tokens": 500}, {"train_tokenizer": 290}):
        cut_off(sources, out, 150)
        build_corpus([sources], tmp_path / "whole", overwrite=True, **(OPTIONS | changes))
        build_corpus([sources], out, overwrite=True, **(OPTIONS | changes))
        assert contents(out) == contents(tmp_path / "whole")
        (out / "index.json").rename(tmp_path / "aside")
        for file in out.iterdir():
            file.unlink()


def test_two_builds_of_one_corpus_do_not_mix(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def progress(done: int, total: int) -> None:
        if done == 50:
            with pytest.raises(DataError, match=rf"{out}: another build of it is going on"):
                build_corpus([sources], out, **OPTIONS)

    build_corpus([sources], out, progress=progress, **OPTIONS)
    assert TokenShards.open(out).num_documents > 150


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_leaves_no_trace(sources: Path, tmp_path: Path, workers: int) -> None:
    """Nor does a build that one number of them begins and another ends."""
    build_corpus([sources], tmp_path / "one", **OPTIONS)
    if workers == 3:
        cut_off(sources, tmp_path / "many", 120)
    before = dict(os.environ)
    build_corpus([sources], tmp_path / "many", workers=workers, **OPTIONS)
    assert os.environ == before
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def die(texts: list[str]) -> None:
    os._exit(1)


def test_a_worker_that_dies_is_named(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "encode", die)
    with pytest.raises(CapacityError, match=r"one of 2 workers died.*take fewer workers"):
        build_corpus([sources], tmp_path / "out", workers=2, **OPTIONS)


@pytest.mark.parametrize("option", ["workers", "hub_documents"])
def test_nobody_cannot_work(sources: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}: 0 is not a positive number"):
        build_corpus([sources], tmp_path / "out", **{option: 0}, **OPTIONS)


def test_sources_held_out_as_a_whole(sources: Path, tmp_path: Path) -> None:
    """All of them and nothing else, and the tokenizer learns nothing of them."""
    held = tmp_path / "held.txt"
    held.write_text("zyzzyva zyzzyva zyzzyva " * 50)
    options: dict[str, Any] = OPTIONS | {"train_tokenizer": 400}
    build_corpus([sources], tmp_path / "out", valid=[held, sources / "a.jsonl"], **options)
    tokenizer = Tokenizer.load(tmp_path / "out")
    valid = TokenShards.open(tmp_path / "out", "valid")
    text = tokenizer.decode(valid.window(0, valid.num_tokens).tolist())
    rows = [json.loads(line)["text"] for line in (sources / "a.jsonl").read_text().splitlines()]
    expected = [held.read_text(), *(row for row in rows if row)]
    assert text.split("<|endoftext|>")[:-1] == expected
    assert valid.num_documents == len(expected)
    assert len(tokenizer.encode("zyzzyva")) == 7
    train = TokenShards.open(tmp_path / "out").num_documents
    build_corpus([sources], tmp_path / "all", valid_fraction=0.0, train_tokenizer=300)
    assert train == TokenShards.open(tmp_path / "all").num_documents


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_builds_give_the_same_bytes(sources: Path, tmp_path: Path, seed: int) -> None:
    """SIGKILL at set documents and at random times, in processes of their own."""
    out, draw = tmp_path / "out", random.Random(seed)

    def start(kill_at: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SCRIPT, str(sources), str(out), str(kill_at)]
        return subprocess.Popen(command)

    for kill_at in sorted(draw.sample(range(1, 220), 3)):
        assert start(kill_at).wait() == -signal.SIGKILL
    process = start(0)
    time.sleep(draw.uniform(0.5, 2.0))
    process.kill()
    process.wait()
    if not out.exists():
        assert start(0).wait() == 0
    build_corpus([sources], tmp_path / "whole", **OPTIONS)
    assert contents(out) == contents(tmp_path / "whole")


def test_the_journal_survives_any_cut(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    journal = Journal(tmp_path, ["a", 1])
    for number in range(3):
        journal.record("state", {"documents": number})
    data = (tmp_path / "journal.jsonl").read_bytes()
    edges = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in range(len(data)):
        (tmp_path / "journal.jsonl").write_bytes(data[:cut])
        whole = sum(edge <= cut for edge in edges)
        entries = Journal(tmp_path, ["a", 1]).entries
        assert entries.get("state") == ({"documents": whole - 2} if whole > 1 else None)
        assert entries["plan"] == ["a", 1]
