"""Mixtures: shares, order, what is refused, and runs on them."""

import random
from collections import Counter
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import run_helpers as runs
from mor.data.batches import Batches, TokenShards
from mor.data.corpus import Document, build_from_documents
from mor.data.mixture import SEQUENCES_PER_CYCLE, MixedBatches, sequence_quotas
from mor.errors import ConfigError, DataError
from mor.io.tokenizer import Tokenizer
from mor.train.config import TrainConfig
from mor.train.trainer import Trainer
from mor.train.training_data import TrainingData

LENGTH = 8
Weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)


class Numbered(Batches):
    """Stands for a corpus: the row at a position says which corpus and which position."""

    def __init__(self, source: int) -> None:
        self.source, self.num_windows = source, 7

    def row(self, position: int) -> Any:
        return np.array([self.source, position])


def mixed(weights: list[float], seed: int = 0, batch_size: int = 4) -> MixedBatches:
    parts = [Numbered(i) for i in range(len(weights))]
    return MixedBatches(parts, weights, batch_size=batch_size, seed=seed)


# Shares and order


@given(weights=Weights, total=st.integers(12, 3000))
def test_quotas_are_the_nearest_whole_shares(weights: list[float], total: int) -> None:
    counts = sequence_quotas(weights, total)
    assert sum(counts) == total
    exact = [w / sum(weights) * total for w in weights]
    assert all(c >= 1 for c in counts)
    if min(exact) >= 1:
        assert all(abs(c - e) < 1 for c, e in zip(counts, exact, strict=True))
    for i, j in ((i, j) for i in range(len(counts)) for j in range(len(counts))):
        assert weights[i] > weights[j] or counts[i] <= counts[j] + 1


def test_quotas_by_hand() -> None:
    assert sequence_quotas([2, 1]) == [667, 333]
    assert sequence_quotas([1, 1, 1], 4) in ([2, 1, 1], [1, 2, 1], [1, 1, 2])
    assert sequence_quotas([1e-9, 1]) == [1, 999]
    with pytest.raises(ConfigError, match="3 corpora cannot share 2"):
        sequence_quotas([1, 1, 1], 2)


@given(weights=Weights, seed=st.integers(0, 9), block=st.integers(0, 10**9))
def test_each_block_has_the_shares_and_each_corpus_its_own_order(
    weights: list[float], seed: int, block: int
) -> None:
    """Any block can be entered at once, and no sequence of a corpus is left out or comes twice."""
    batches = mixed(weights, seed)
    seen = [batches.source_of(block * SEQUENCES_PER_CYCLE + i) for i in range(SEQUENCES_PER_CYCLE)]
    counts = sequence_quotas(weights)
    for source, share in enumerate(counts):
        places = [place for s, place in seen if s == source]
        assert places == list(range(block * share, (block + 1) * share))


@given(size=st.integers(1, 50), world=st.integers(1, 5), first=st.integers(0, 5000))
def test_the_order_is_one_whatever_reads_it(size: int, world: int, first: int) -> None:
    """Cut into batches of any size and read by any number of ranks, from any place on."""
    weights, one = [3.0, 1.0], mixed([3.0, 1.0], batch_size=1)
    ranks = [mixed(weights, batch_size=size) for _ in range(world)]
    indices = range(first, first + 3)
    rows = torch.cat([ranks[index % world].at(index) for index in indices])
    expected = [one.row(position) for position in range(first * size, (first + 3) * size)]
    assert np.array_equal(rows.numpy(), np.stack(expected))


def test_corpora_alternate_like_draws_without_replacement() -> None:
    """Shares of a short stretch scatter as chance would have it, and seeds and blocks differ."""
    batches = mixed([0.7, 0.2, 0.1])
    order = [batches.source_of(i)[0] for i in range(20 * SEQUENCES_PER_CYCLE)]
    assert Counter(order) == {0: 14000, 1: 4000, 2: 2000}
    stretches = np.array(order).reshape(-1, 100) == 0
    deviations = (stretches.mean(1) - 0.7) / (0.7 * 0.3 / 100 * 900 / 999) ** 0.5
    assert abs(deviations.std() - 1) < 0.15
    assert abs(deviations).max() < 5
    pairs = np.mean([a == b for a, b in pairwise(order)])
    assert pairs == pytest.approx(0.49 + 0.04 + 0.01, abs=0.02)  # neighbors are independent
    assert order[:SEQUENCES_PER_CYCLE] != order[SEQUENCES_PER_CYCLE : 2 * SEQUENCES_PER_CYCLE]
    assert order[:SEQUENCES_PER_CYCLE] != [
        mixed([0.7, 0.2, 0.1], seed=1).source_of(i)[0] for i in range(SEQUENCES_PER_CYCLE)
    ]


def test_negative_batches_are_refused() -> None:
    with pytest.raises(DataError, match="batch -1"):
        mixed([1, 1]).at(-1)


# Corpora


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two corpora of other words with one tokenizer: letters and digits."""
    folder, draw = tmp_path_factory.mktemp("mixture"), random.Random(1)
    first = folder / "letters"
    letters = [Document(f"l{i}", "".join(draw.choices("abcdef ", k=300))) for i in range(30)]
    digits = [Document(f"d{i}", "".join(draw.choices("012345 ", k=200))) for i in range(12)]
    build_from_documents(letters + digits, folder / "both", train_tokenizer=280)
    build_from_documents(letters, first, tokenizer=folder / "both", valid_fraction=0.2)
    build_from_documents(digits, folder / "digits", tokenizer=folder / "both", valid_fraction=0.2)
    return [first, folder / "digits"]


def mixture(corpora: list[Path], *weights: float) -> list[dict[str, Any]]:
    pairs = zip(corpora, weights, strict=True)
    return [{"path": str(path), "weight": weight} for path, weight in pairs]


def config(corpora: list[Path], *weights: float, **changes: Any) -> TrainConfig:
    values = {"sequence_length": LENGTH, "batch_size": 4, "eval_windows": 10, **changes}
    return TrainConfig(data=mixture(corpora, *weights), **values)


def kind_of(tokenizer: Tokenizer, row: Any) -> str:
    text = tokenizer.decode([int(token) for token in row])
    return "digits" if any(c.isdigit() for c in text) else "letters"


def test_batches_windows_and_calibration_hold_the_shares(corpora: list[Path]) -> None:
    given = config(corpora, 4, 1, calibration_windows=20)
    data = TrainingData.open(given, [(Path(p), w) for p, w in given.corpora], 100)
    rows = torch.cat([data.batches.at(i) for i in range(10)])
    kinds = Counter(kind_of(data.tokenizer, row) for row in rows)
    assert kinds == {"letters": 800, "digits": 200}
    assert data.calibration is not None
    assert Counter(kind_of(data.tokenizer, r) for r in data.valid) == {"letters": 8, "digits": 2}
    found = Counter(kind_of(data.tokenizer, r) for r in data.calibration)
    assert found == {"letters": 16, "digits": 4}


def test_a_corpus_in_a_mixture_is_read_epoch_by_epoch(corpora: list[Path]) -> None:
    """Each window once before any comes twice, as without the mixture."""
    given = config(corpora, 1, 1)
    data = TrainingData.open(given, [(Path(p), w) for p, w in given.corpora], 1)
    shards = TokenShards.open(corpora[1])
    alone = Batches(shards, sequence_length=LENGTH, batch_size=1, seed=0, stream=1)
    rows = (data.batches.row(i) for i in count())
    digits = (row for row in rows if kind_of(data.tokenizer, row) == "digits")
    seen = [tuple(row) for row in islice(digits, 2 * alone.num_windows)]
    assert seen == [tuple(alone.row(i)) for i in range(2 * alone.num_windows)]
    first, second = seen[: alone.num_windows], seen[alone.num_windows :]
    assert first != second
    assert Counter(first) == Counter(second)


def test_one_corpus_as_a_mixture_is_that_corpus(corpora: list[Path]) -> None:
    given = config(corpora[:1], 5)
    data = TrainingData.open(given, [(corpora[0], 5.0)], 4)
    plain = Batches(TokenShards.open(corpora[0]), sequence_length=LENGTH, batch_size=4, seed=0)
    assert torch.equal(data.batches.at(3), plain.at(3))


def test_another_tokenizer_is_refused(corpora: list[Path], corpus: Path) -> None:
    given = config([corpora[0], corpus], 1, 1)
    with pytest.raises(
        DataError, match=rf"{corpus}: made with another tokenizer than {corpora[0]}"
    ):
        TrainingData.open(given, [(Path(p), w) for p, w in given.corpora], 4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "names no corpus: a mixture is a list such as"),
        (["web"], "holds 'web', which has no path"),
        ([{"weight": 2}], "has no path"),
        ([{"path": "web", "wieght": 2}], "'wieght' is unknown: did you mean 'weight'"),
        ([{"path": "web", "weight": 0}], "weight=0 of web must be above 0"),
        ([{"path": "web", "weight": "2"}], "weight='2' of web must be above 0"),
        ([{"path": "web", "weight": float("inf")}], "must be above 0"),
        ([{"path": "web"}, {"path": "stdlib"}], "'stdlib' cannot be mixed"),
    ],
)
def test_impossible_mixtures_are_refused(data: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig.from_dict({"data": data})


@pytest.mark.usefixtures("one_thread")
def test_a_run_on_a_mixture_resumes_as_if_it_had_not_been_stopped(
    corpora: list[Path], tmp_path: Path
) -> None:
    values = runs.settings(corpora[0], data=mixture(corpora, 3, 1), save_every=0)
    runs.train(values, tmp_path / "whole")
    seen: list[Any] = []
    options = {"on_step": seen.append, "should_stop": lambda: len(seen) >= 9}
    trainer = Trainer(TrainConfig.from_dict(values), tmp_path / "run", **options)
    assert trainer.run() == "stopped"
    runs.train(values, tmp_path / "run", resume="auto")
    assert runs.result(tmp_path / "run") == runs.result(tmp_path / "whole")
    other = {**values, "data": mixture(corpora, 1, 1)}
    with pytest.raises(ConfigError, match="it was trained with data="):
        Trainer(TrainConfig.from_dict(other), tmp_path / "run", resume="auto")
