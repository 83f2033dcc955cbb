"""Reading shards: seams that nobody sees, an order that resumes anywhere, damage that is named."""

import json
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mor.data.batches import Batches, TokenShards, sequential_windows
from mor.data.shards import CorpusIndex, Shard
from mor.errors import ConfigError, DataError


def write_corpus(folder: Path, shards: Sequence[Sequence[int]], vocab_size: int = 1000) -> Path:
    """A corpus whose train split has these tokens, written without the code that builds one."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = "<u2" if vocab_size <= 65536 else "<u4"
    entries = []
    for number, tokens in enumerate(shards):
        data = np.asarray(tokens, dtype).tobytes()
        (folder / f"train-{number:05d}.bin").write_bytes(data)
        entries.append(Shard(f"train-{number:05d}.bin", len(tokens), 1, zlib.crc32(data)))
    index = CorpusIndex(vocab_size, 0, {"train": tuple(entries), "valid": ()})
    (folder / "index.json").write_text(index.to_json())
    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """New folders, also inside the examples of a property."""
    return lambda: tmp_path_factory.mktemp("corpus")


def counting_shards(folder: Path, sizes: Sequence[int], vocab_size: int = 1000) -> TokenShards:
    """Shards of these sizes in which every token is its own position."""
    edges = np.cumsum([0, *sizes])
    parts = [range(a, b) for a, b in pairwise(edges)]
    return TokenShards.open(write_corpus(folder, parts, vocab_size))


Sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)


# TokenShards


@settings(deadline=None, max_examples=60)
@given(sizes=Sizes, data=st.data())
def test_shard_boundaries_are_invisible(
    scratch: Callable[[], Path], sizes: list[int], data: st.DataObject
) -> None:
    shards = counting_shards(scratch(), sizes)
    assert shards.num_tokens == sum(sizes)
    assert shards.num_documents == len(sizes)
    start = data.draw(st.integers(0, sum(sizes)))
    length = data.draw(st.integers(0, sum(sizes) - start))
    window = shards.window(start, length)
    assert window.dtype == np.int64
    assert window.tolist() == list(range(start, start + length))


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65536, 2), (65537, 4)])
def test_the_vocabulary_decides_the_storage_type(
    tmp_path: Path, vocab_size: int, itemsize: int
) -> None:
    tokens = [0, 65535, vocab_size - 1]
    shards = TokenShards.open(write_corpus(tmp_path, [tokens], vocab_size))
    assert (tmp_path / "train-00000.bin").stat().st_size == 3 * itemsize
    assert shards.window(0, 3).tolist() == tokens
    assert (shards.vocab_size, shards.eos_id) == (vocab_size, 0)


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 11), (10, 1), (3, -1)])
def test_windows_outside_the_split_are_refused(tmp_path: Path, start: int, length: int) -> None:
    shards = counting_shards(tmp_path, [4, 6])
    with pytest.raises(DataError, match=r"do not lie in the split 'train', which holds 10"):
        shards.window(start, length)


# Damage


def test_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path}: there is no corpus here .*mor data build"):
        TokenShards.open(tmp_path)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_missing_split_is_named(tmp_path: Path, split: str) -> None:
    write_corpus(tmp_path, [[1, 2]])
    with pytest.raises(DataError, match=rf"no documents in the split '{split}', only in train"):
        TokenShards.open(tmp_path, split)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path, [[1, 2], [3, 4]])
    (tmp_path / "train-00001.bin").unlink()
    with pytest.raises(DataError, match=r"train-00001\.bin: the shard is missing: rebuild with"):
        TokenShards.open(tmp_path, verify=False)


@pytest.mark.parametrize("size", [0, 10, 19, 22])
def test_shard_of_another_size_is_named(tmp_path: Path, size: int) -> None:
    write_corpus(tmp_path, [range(10)])
    (tmp_path / "train-00000.bin").write_bytes(b"\0" * size)
    message = rf"train-00000\.bin: holds {size} bytes, the index says 20: rebuild with `mor data"
    with pytest.raises(DataError, match=message):
        TokenShards.open(tmp_path, verify=False)


@settings(deadline=None, max_examples=40)
@given(sizes=Sizes, data=st.data())
def test_any_flipped_bit_is_noticed(
    scratch: Callable[[], Path], sizes: list[int], data: st.DataObject
) -> None:
    folder = scratch()
    counting_shards(folder, sizes)
    number = data.draw(st.integers(0, len(sizes) - 1))
    shard = folder / f"train-{number:05d}.bin"
    content = bytearray(shard.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"{shard.name}: its content has changed"):
        TokenShards.open(folder)
    assert TokenShards.open(folder, verify=False).num_tokens == sum(sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, this mor reads 1"),
        ({"version": None}, "version None"),
        ({"dtype": "uint32"}, "dtype uint32 does not fit vocab_size 1000"),
        ({"vocab_size": "many"}, "invalid literal"),
        ({"splits": []}, "not a readable index"),
        ({"splits": {"train": [{"file": "train-00000.bin"}]}}, "not a readable index"),
        ({"splits": {"train": 3}}, "not a readable index"),
    ],
)
def test_damaged_index_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    index = write_corpus(tmp_path, [[1, 2, 3]]) / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(DataError, match=rf"index\.json: .*{message}.*: rebuild with"):
        TokenShards.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../train-00000.bin"}, "does not lie in the folder"),
        ({"num_tokens": 0}, "impossible numbers"),
        ({"num_tokens": "3"}, "impossible numbers"),
        ({"crc32": None}, "impossible numbers"),
        ({"color": "red"}, "color"),
    ],
)
def test_damaged_shard_entry_is_named(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    file = write_corpus(tmp_path, [[1, 2, 3]]) / "index.json"
    index = json.loads(file.read_text())
    index["splits"]["train"][0] |= change
    file.write_text(json.dumps(index))
    with pytest.raises(DataError, match=rf"index\.json: .*{message}"):
        TokenShards.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_unreadable_index_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(DataError, match=r"index\.json: not a readable index"):
        TokenShards.open(tmp_path)


def test_missing_index_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"version": 1}')
    with pytest.raises(DataError, match=r"index\.json: the field 'vocab_size' is missing"):
        TokenShards.open(tmp_path)


# Batches


def draw_batches(
    folder: Path, data: st.DataObject, *, shuffle: bool = True
) -> tuple[Batches, dict[str, int]]:
    numbers = {
        "sequence_length": data.draw(st.integers(1, 9), label="sequence_length"),
        "batch_size": data.draw(st.integers(1, 7), label="batch_size"),
        "seed": data.draw(st.integers(0, 2**63), label="seed"),
    }
    sizes = data.draw(
        Sizes.filter(lambda sizes: sum(sizes) > numbers["sequence_length"]), label="sizes"
    )
    shards = counting_shards(folder, sizes)
    return Batches(shards, **numbers, shuffle=shuffle), numbers | {"tokens": sum(sizes)}


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_every_window_comes_once_per_epoch(
    scratch: Callable[[], Path], data: st.DataObject
) -> None:
    batches, numbers = draw_batches(scratch(), data)
    length, rows = numbers["sequence_length"], numbers["batch_size"]
    num_windows = batches.num_windows
    assert num_windows == (numbers["tokens"] - 1) // length >= 1
    assert batches.at(0).shape == (rows, length + 1)

    num_epochs = 3
    num_batches = -(-num_epochs * num_windows // rows)
    drawn = torch.cat([batches.at(index) for index in range(num_batches)])
    assert drawn.shape == (num_batches * rows, length + 1)
    assert drawn.dtype == torch.int64
    starts = drawn[:, 0]
    assert torch.equal(drawn, starts[:, None] + torch.arange(length + 1))
    expected = Counter(range(0, num_windows * length, length))
    for epoch in range(num_epochs):
        seen = starts[epoch * num_windows : (epoch + 1) * num_windows]
        assert Counter(seen.tolist()) == expected


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_resuming_at_any_batch_gives_the_same_batches(
    scratch: Callable[[], Path], data: st.DataObject
) -> None:
    batches, numbers = draw_batches(scratch(), data)
    run = [batches.at(index) for index in range(12)]
    arguments = {name: numbers[name] for name in ("sequence_length", "batch_size", "seed")}
    for index in data.draw(st.permutations(range(12))):
        assert torch.equal(batches.at(index), run[index])  # whatever was read before
        assert torch.equal(Batches(batches._shards, **arguments).at(index), run[index])


def test_the_cut_into_shards_does_not_change_the_order(tmp_path: Path) -> None:
    whole = counting_shards(tmp_path / "whole", [100])
    parts = counting_shards(tmp_path / "parts", [1, 32, 7, 60])
    first, second = (
        Batches(shards, sequence_length=5, batch_size=3, seed=7) for shards in (whole, parts)
    )
    assert all(torch.equal(first.at(index), second.at(index)) for index in range(15))


def test_epochs_and_seeds_differ_in_order(tmp_path: Path) -> None:
    shards = counting_shards(tmp_path, [401])
    batches = Batches(shards, sequence_length=4, batch_size=100, seed=0)
    other_seed = Batches(shards, sequence_length=4, batch_size=100, seed=1)
    orders = [
        [*map(int, batch[:, 0])] for batch in (batches.at(0), batches.at(1), other_seed.at(0))
    ]
    in_order = list(range(0, 400, 4))
    assert [sorted(order) for order in orders] == [in_order] * 3
    assert len({tuple(order) for order in [*orders, in_order]}) == 4


def test_an_order_once_used_stays(tmp_path: Path) -> None:
    """Runs in progress resume with it, so it may change only with a note in the changelog."""
    batches = Batches(counting_shards(tmp_path, [41]), sequence_length=4, batch_size=5, seed=3)
    starts = [batches.at(index)[:, 0].tolist() for index in (0, 1, 1000)]
    assert starts == [[36, 24, 0, 8, 4], [16, 28, 20, 12, 32], [12, 32, 16, 4, 8]]


def test_without_shuffling_windows_come_in_the_order_of_the_text(tmp_path: Path) -> None:
    shards = counting_shards(tmp_path, [9, 9])
    batches = Batches(shards, sequence_length=4, batch_size=3, seed=0, shuffle=False)
    assert batches.at(0)[:, 0].tolist() == [0, 4, 8]
    assert batches.at(1)[:, 0].tolist() == [12, 0, 4]


def test_a_far_batch_costs_one_permutation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    default_rng = np.random.default_rng
    monkeypatch.setattr(
        np.random, "default_rng", lambda seed: seeds.append(seed) or default_rng(seed)
    )
    batches = Batches(counting_shards(tmp_path, [100]), sequence_length=9, batch_size=11, seed=5)
    batches.at(10**12)
    batches.at(10**12)
    assert seeds == [(5, 10**12, 0)]
    batches = Batches(counting_shards(tmp_path, [100]), sequence_length=9, batch_size=10, seed=5)
    seeds.clear()
    assert batches.num_windows == 11
    batches.at(1)  # its last nine windows are of the next epoch
    assert seeds == [(5, 0, 0), (5, 1, 0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0"),
        ({"sequence_length": 0}, "sequence_length: 0"),
        ({"seed": -1}, "seed: -1"),
    ],
)
def test_impossible_batches_are_refused(
    tmp_path: Path, change: dict[str, int], message: str
) -> None:
    shards = counting_shards(tmp_path, [100])
    arguments = {"sequence_length": 4, "batch_size": 2, "seed": 0}
    assert Batches(shards, **arguments).at(0).shape == (2, 5)
    with pytest.raises(ConfigError, match=message):
        Batches(shards, **(arguments | change))


def test_negative_batch_is_refused(tmp_path: Path) -> None:
    batches = Batches(counting_shards(tmp_path, [9]), sequence_length=4, batch_size=2, seed=0)
    with pytest.raises(DataError, match="batch -1: batches are numbered from 0"):
        batches.at(-1)


def test_too_few_tokens_are_named(tmp_path: Path) -> None:
    shards = counting_shards(tmp_path, [5, 3])
    assert Batches(shards, sequence_length=7, batch_size=1, seed=0).num_windows == 1
    message = r"'train' holds 8 tokens, one window of sequence_length 8 needs 9"
    with pytest.raises(DataError, match=message):
        Batches(shards, sequence_length=8, batch_size=1, seed=0)
    with pytest.raises(DataError, match=message):
        sequential_windows(shards, 8)  # at once, not when the first window is taken


# Evaluation


@settings(deadline=None, max_examples=40)
@given(sizes=Sizes, data=st.data())
def test_evaluation_sees_every_target_once(
    scratch: Callable[[], Path], sizes: list[int], data: st.DataObject
) -> None:
    total = sum(sizes) + 1
    shards = counting_shards(scratch(), [*sizes, 1])
    length = data.draw(st.integers(1, total - 1))
    windows = list(sequential_windows(shards, length))
    assert {window.shape for window in windows} == {(length + 1,)}
    targets = np.concatenate([window[1:] for window in windows])
    assert targets.tolist() == list(range(1, 1 + (total - 1) // length * length))
    assert all((window[1:] == window[:-1] + 1).all() for window in windows)


def test_evaluation_stops_at_max_windows(tmp_path: Path) -> None:
    shards = counting_shards(tmp_path, [30])
    starts = [int(window[0]) for window in sequential_windows(shards, 5, max_windows=3)]
    assert starts == [0, 5, 10]
    assert len(list(sequential_windows(shards, 5, max_windows=99))) == 5
    with pytest.raises(ConfigError, match="max_windows: 0"):
        sequential_windows(shards, 5, max_windows=0)
