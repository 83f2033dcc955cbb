"""`RaggedBatch` against plain Python: for each sequence, the list of its present positions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mor.model.ragged_batch import RaggedBatch

CPU = torch.device("cpu")
Rows = list[list[int]]


def model_of(ragged: RaggedBatch) -> Rows:
    """The plain model of a ragged batch: lists of positions."""
    rows: Rows = [[] for _ in range(ragged.batch)]
    for row, position in zip(ragged.sequence_ids.tolist(), ragged.positions.tolist(), strict=True):
        rows[row].append(position)
    return rows


def check(ragged: RaggedBatch, rows: Rows, time: int) -> None:
    """Every attribute agrees with the plain model."""
    lengths = [len(row) for row in rows]
    assert model_of(ragged) == rows
    assert ragged.num_tokens == sum(lengths)
    assert ragged.batch == len(rows)
    assert ragged.width == max(lengths)
    assert (ragged.padded_indices is None) == (len(set(lengths)) == 1)
    assert ragged.token_indices.tolist() == [
        i * time + t for i, row in enumerate(rows) for t in row
    ]
    assert ragged.sequence_ids.tolist() == [i for i, row in enumerate(rows) for _ in row]
    assert all(row == sorted(set(row)) for row in rows)


def check_rows(ragged: RaggedBatch, rows: Rows) -> None:
    """`to_padded` puts each token where its sequence and rank say, zeros after; and back."""
    num = ragged.num_tokens
    x = torch.arange(1, num * 6 + 1).view(num, 2, 3)
    padded = ragged.to_padded(x)
    assert padded.shape == (len(rows), 2, ragged.width, 3)
    token = 0
    for i, row in enumerate(rows):
        for place in range(ragged.width):
            here = padded[i, :, place]
            if place < len(row):
                assert torch.equal(here, x[token])
                token += 1
            else:
                assert not here.any()
    assert torch.equal(ragged.from_padded(padded), x)


@st.composite
def steps(draw: st.DrawFn) -> tuple[int, int, list[list[bool]]]:
    """A (B, T) batch and up to four rounds of marks, one for each token that is present then."""
    batch, time = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    num, rounds = batch * time, []
    for _ in range(draw(st.integers(1, 4))):
        marks = draw(st.lists(st.booleans(), min_size=num, max_size=num))
        rounds.append(marks)
        num = sum(marks)
    return batch, time, rounds


@given(case=steps())
def test_take_again_and_again(case: tuple[int, int, list[list[bool]]]) -> None:
    batch, time, rounds = case
    rows: Rows = [list(range(time)) for _ in range(batch)]
    ragged = RaggedBatch.full(batch, time, CPU)
    check(ragged, rows, time)
    for marks in rounds:
        before = ragged
        ragged, places = ragged.select(torch.tensor(marks, dtype=torch.bool))
        keep = iter(marks)
        rows = [[t for t in row if next(keep)] for row in rows]
        check(ragged, rows, time)
        check_rows(ragged, rows)
        assert places.tolist() == [i for i, mark in enumerate(marks) if mark]
        assert torch.equal(before.token_indices[places], ragged.token_indices)


@given(case=st.data(), batch=st.integers(1, 4), time=st.integers(1, 8))
def test_take_per_row_again_and_again(case: st.DataObject, batch: int, time: int) -> None:
    rows: Rows = [list(range(time)) for _ in range(batch)]
    ragged = RaggedBatch.full(batch, time, CPU)
    while ragged.width > 1:
        num = case.draw(st.integers(1, ragged.width - 1))
        order = st.permutations(range(ragged.width))
        index = [sorted(case.draw(order)[:num]) for _ in range(batch)]
        before = ragged
        ragged, places = ragged.select_per_sequence(torch.tensor(index))
        rows = [[row[i] for i in picked] for row, picked in zip(rows, index, strict=True)]
        check(ragged, rows, time)
        check_rows(ragged, rows)
        assert torch.equal(before.token_indices[places], ragged.token_indices)
        assert torch.equal(before.positions[places], ragged.positions)
        assert ragged.padded_indices is None


@given(batch=st.integers(1, 3), time=st.integers(1, 5), data=st.data())
def test_take_and_take_per_row_agree(batch: int, time: int, data: st.DataObject) -> None:
    num = data.draw(st.integers(1, time))
    index = [sorted(data.draw(st.permutations(range(time)))[:num]) for _ in range(batch)]
    ragged = RaggedBatch.full(batch, time, CPU)
    marks = torch.zeros(batch, time, dtype=torch.bool).scatter(1, torch.tensor(index), True)
    one, places = ragged.select(marks.view(-1))
    other, others = ragged.select_per_sequence(torch.tensor(index))
    assert torch.equal(places, others)
    assert (one.width, one.padded_indices, one.batch) == (
        other.width,
        other.padded_indices,
        other.batch,
    )
    assert torch.equal(one.token_indices, other.token_indices)
    assert torch.equal(one.positions, other.positions)


def test_nobody_stays() -> None:
    ragged = RaggedBatch.full(2, 3, CPU)
    empty, places = ragged.select(torch.zeros(6, dtype=torch.bool))
    assert (empty.num_tokens, empty.width, empty.batch, len(places)) == (0, 0, 2, 0)
    assert empty.to_padded(torch.zeros(0, 2, 4)).shape == (2, 2, 0, 4)
    again, _ = empty.select(torch.zeros(0, dtype=torch.bool))
    assert again.num_tokens == 0


def test_everybody_stays_is_the_same_batch() -> None:
    ragged = RaggedBatch.full(2, 3, CPU)
    same, places = ragged.select(torch.ones(6, dtype=torch.bool))
    assert same is ragged
    assert places.tolist() == list(range(6))
