"""`Packing` against a plain-Python model: for each sequence, the list of its present positions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mor.model.ragged_batch import RaggedBatch

CPU = torch.device("cpu")
Rows = list[list[int]]


def model_of(packing: RaggedBatch) -> Rows:
    """The plain model that a packing stands for."""
    rows: Rows = [[] for _ in range(packing.batch)]
    for row, position in zip(
        packing.sequence_ids.tolist(), packing.positions.tolist(), strict=True
    ):
        rows[row].append(position)
    return rows


def check(packing: RaggedBatch, rows: Rows, time: int) -> None:
    """Every attribute agrees with the plain model."""
    lengths = [len(row) for row in rows]
    assert model_of(packing) == rows
    assert packing.num_tokens == sum(lengths)
    assert packing.batch == len(rows)
    assert packing.width == max(lengths)
    assert (packing.padded_indices is None) == (len(set(lengths)) == 1)
    assert packing.token_indices.tolist() == [
        i * time + t for i, row in enumerate(rows) for t in row
    ]
    assert packing.sequence_ids.tolist() == [i for i, row in enumerate(rows) for _ in row]
    assert all(row == sorted(set(row)) for row in rows)


def check_rows(packing: RaggedBatch, rows: Rows) -> None:
    """`to_rows` puts each token where its sequence and rank say, zeros after; and back."""
    num = packing.num_tokens
    x = torch.arange(1, num * 6 + 1).view(num, 2, 3)
    padded = packing.to_padded(x)
    assert padded.shape == (len(rows), 2, packing.width, 3)
    token = 0
    for i, row in enumerate(rows):
        for place in range(packing.width):
            here = padded[i, :, place]
            if place < len(row):
                assert torch.equal(here, x[token])
                token += 1
            else:
                assert not here.any()
    assert torch.equal(packing.from_padded(padded), x)


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
    packing = RaggedBatch.full(batch, time, CPU)
    check(packing, rows, time)
    for marks in rounds:
        before = packing
        packing, places = packing.select(torch.tensor(marks, dtype=torch.bool))
        keep = iter(marks)
        rows = [[t for t in row if next(keep)] for row in rows]
        check(packing, rows, time)
        check_rows(packing, rows)
        assert places.tolist() == [i for i, mark in enumerate(marks) if mark]
        assert torch.equal(before.token_indices[places], packing.token_indices)


@given(case=st.data(), batch=st.integers(1, 4), time=st.integers(1, 8))
def test_take_per_row_again_and_again(case: st.DataObject, batch: int, time: int) -> None:
    rows: Rows = [list(range(time)) for _ in range(batch)]
    packing = RaggedBatch.full(batch, time, CPU)
    while packing.width > 1:
        num = case.draw(st.integers(1, packing.width - 1))
        order = st.permutations(range(packing.width))
        index = [sorted(case.draw(order)[:num]) for _ in range(batch)]
        before = packing
        packing, places = packing.select_per_sequence(torch.tensor(index))
        rows = [[row[i] for i in picked] for row, picked in zip(rows, index, strict=True)]
        check(packing, rows, time)
        check_rows(packing, rows)
        assert torch.equal(before.token_indices[places], packing.token_indices)
        assert torch.equal(before.positions[places], packing.positions)
        assert packing.padded_indices is None


@given(batch=st.integers(1, 3), time=st.integers(1, 5), data=st.data())
def test_take_and_take_per_row_agree(batch: int, time: int, data: st.DataObject) -> None:
    num = data.draw(st.integers(1, time))
    index = [sorted(data.draw(st.permutations(range(time)))[:num]) for _ in range(batch)]
    packing = RaggedBatch.full(batch, time, CPU)
    marks = torch.zeros(batch, time, dtype=torch.bool).scatter(1, torch.tensor(index), True)
    one, places = packing.select(marks.view(-1))
    other, others = packing.select_per_sequence(torch.tensor(index))
    assert torch.equal(places, others)
    assert (one.width, one.padded_indices, one.batch) == (
        other.width,
        other.padded_indices,
        other.batch,
    )
    assert torch.equal(one.token_indices, other.token_indices)
    assert torch.equal(one.positions, other.positions)


def test_nobody_stays() -> None:
    packing = RaggedBatch.full(2, 3, CPU)
    empty, places = packing.select(torch.zeros(6, dtype=torch.bool))
    assert (empty.num_tokens, empty.width, empty.batch, len(places)) == (0, 0, 2, 0)
    assert empty.to_padded(torch.zeros(0, 2, 4)).shape == (2, 2, 0, 4)
    again, _ = empty.select(torch.zeros(0, dtype=torch.bool))
    assert again.num_tokens == 0


def test_everybody_stays_is_the_same_packing() -> None:
    packing = RaggedBatch.full(2, 3, CPU)
    same, places = packing.select(torch.ones(6, dtype=torch.bool))
    assert same is packing
    assert places.tolist() == list(range(6))
