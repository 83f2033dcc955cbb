"""Where a corpus is written: all of it or nothing, and nothing of the user's is lost."""

import errno
import io
from pathlib import Path
from typing import Any

import pytest

from mor.data.batches import TokenShards
from mor.data.corpus import Document, build_from_documents
from mor.errors import CapacityError, DataError
from mor.io.tokenizer import Tokenizer

DOCUMENTS = [Document(f"doc{number}", f"text number {number}, " * 3) for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tokenizer.train(["text number"], 270).save(tmp_path_factory.mktemp("tokenizer"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_empty_or_missing_folder_is_taken(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "deep"):
        build_from_documents(DOCUMENTS, out, tokenizer=tokenizer_file)
        assert TokenShards.open(out).num_documents > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


def test_a_corpus_is_replaced_only_if_told_to(tmp_path: Path, tokenizer_file: Path) -> None:
    out = tmp_path / "out"
    build_from_documents(DOCUMENTS, out, tokenizer=tokenizer_file, shard_tokens=100)
    before = contents(out)
    with pytest.raises(DataError, match=rf"{out}: the folder is not empty: choose .* overwrite"):
        build_from_documents(DOCUMENTS[:3], out, tokenizer=tokenizer_file)
    assert contents(out) == before
    build_from_documents(DOCUMENTS[:3], out, tokenizer=tokenizer_file, overwrite=True)
    assert len(contents(out)) == 6 < len(before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_never_takes_other_files_along(tmp_path: Path, tokenizer_file: Path) -> None:
    out = tmp_path / "out"
    build_from_documents(DOCUMENTS, out, tokenizer=tokenizer_file)
    (out / "thesis.tex").write_text("years of work")
    before = contents(out)
    with pytest.raises(DataError, match=r"holds thesis\.tex, which is no part of a corpus"):
        build_from_documents(DOCUMENTS, out, tokenizer=tokenizer_file, overwrite=True)
    assert contents(out) == before


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_way_is_named(tmp_path: Path, tokenizer_file: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=rf"{name}: is not a folder"):
        build_from_documents(DOCUMENTS, tmp_path / name, tokenizer=tokenizer_file, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_build_that_ended_first_is_not_replaced(tmp_path: Path, tokenizer_file: Path) -> None:
    out = tmp_path / "out"

    def another_build(done: int, total: int) -> None:
        build_from_documents(DOCUMENTS[:3], out, tokenizer=tokenizer_file)

    with pytest.raises(DataError, match="the folder is not empty"):
        build_from_documents(DOCUMENTS, out, tokenizer=tokenizer_file, progress=another_build)
    num_documents = [TokenShards.open(out, split).num_documents for split in ("train", "valid")]
    assert sum(num_documents) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class FullDisk:
    """Lets files below a folder `*.tmp-*` have so many bytes in all, then says ENOSPC."""

    def __init__(self, free_bytes: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free_bytes = free_bytes
        self.used_bytes = 0
        disk = self

        class Limited(io.FileIO):
            def write(self, data: Any) -> int:
                disk.used_bytes += len(memoryview(data).cast("B"))
                if disk.used_bytes > disk.free_bytes:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return super().write(data)

        real_open = io.open

        def limited_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "w" not in mode or ".tmp-" not in Path(path).parent.name:
                return real_open(path, mode, *args, **kwargs)
            file = io.BufferedWriter(Limited(path, "w"), 64)
            return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

        monkeypatch.setattr(io, "open", limited_open)  # which all of pathlib goes through


def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build_from_documents(DOCUMENTS[:3], out, tokenizer=tokenizer_file)
    before = contents(out)
    disk = FullDisk(float("inf"), monkeypatch)

    def build() -> None:
        build_from_documents(
            DOCUMENTS, out, tokenizer=tokenizer_file, shard_tokens=500, overwrite=True
        )

    build()
    assert disk.used_bytes == sum(map(len, contents(out).values()))
    needed = disk.used_bytes
    build_from_documents(DOCUMENTS[:3], out, tokenizer=tokenizer_file, overwrite=True)
    # Wherever the space ends: in a shard, its document starts, the tokenizer, the index.
    for free_bytes in [*range(0, needed, needed // 25), needed - 1]:
        disk.free_bytes, disk.used_bytes = free_bytes, 0
        with pytest.raises(CapacityError, match=rf"{out}: No space left on device: free some"):
            build()
        assert contents(out) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    disk.free_bytes, disk.used_bytes = needed, 0
    build()
    assert contents(out) != before


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_build_leaves_everything_as_it_was(
    tmp_path: Path, tokenizer_file: Path, overwrite: bool
) -> None:
    out = tmp_path / "out"
    if overwrite:
        build_from_documents(DOCUMENTS[:3], out, tokenizer=tokenizer_file)
    before = contents(out) if overwrite else {}

    def interrupt(done: int, total: int) -> None:
        assert list(tmp_path.glob("out.tmp-*/train-00000.bin"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_from_documents(
            DOCUMENTS, out, tokenizer=tokenizer_file, overwrite=overwrite, progress=interrupt
        )
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwrite else [])
    assert not overwrite or contents(out) == before


def test_a_failed_swap_brings_the_old_corpus_back(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build_from_documents(DOCUMENTS[:3], out, tokenizer=tokenizer_file)
    before = contents(out)
    replace = Path.replace

    def no_staging(path: Path, target: Path) -> Path:
        if ".tmp-" in path.name:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", no_staging)
    with pytest.raises(DataError, match=rf"{out}: cannot be written \(Operation not permitted"):
        build_from_documents(DOCUMENTS, out, tokenizer=tokenizer_file, overwrite=True)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
