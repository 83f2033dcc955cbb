"""Pages: none is lost, none is given twice, and entries lie where the layout says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.engine.pages import PageLayout, PagePool, PageTable
from mor.errors import CapacityError

LAYOUTS = st.builds(
    lambda size, layers, more: PageLayout(
        block_size=size, layers=layers, layers_per_page=layers * more + more % layers
    ),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
)


def test_a_page_is_free_when_nobody_holds_it() -> None:
    pool = PagePool(3)
    first, second = pool.allocate(), pool.allocate()
    assert first != second
    pool.incref(first)
    pool.decref(first)
    assert pool.num_free == 1
    pool.check_integrity([first, second])
    pool.decref(first)
    assert pool.num_free == 2
    pool.check_integrity([second])
    pool.decref(second)
    pool.check_integrity([])


def test_pages_run_out_with_an_error_that_says_so() -> None:
    pool = PagePool(2)
    taken = {pool.allocate(), pool.allocate()}
    assert taken == {0, 1}
    with pytest.raises(CapacityError, match="all 2 pages are in use"):
        pool.allocate()


def test_wrong_bookkeeping_is_noticed() -> None:
    pool = PagePool(2)
    page = pool.allocate()
    for held in ([], [page, page], [1 - page]):
        with pytest.raises(AssertionError, match="leaked"):
            pool.check_integrity(held)
    pool.decref(page)
    with pytest.raises(AssertionError, match="is free"):
        pool.decref(page)
    with pytest.raises(AssertionError, match="is free"):
        pool.incref(page)


def test_a_lower_stack_lays_several_groups_side_by_side() -> None:
    layout = PageLayout(block_size=4, layers=2, layers_per_page=7)
    assert (layout.cell_groups, layout.entries_per_page) == (3, 12)
    assert [layout.pages_for(n) for n in (0, 1, 12, 13)] == [0, 1, 1, 2]
    table = PageTable(layout, PagePool(9))
    table.append(13)
    (first, second) = table.pages
    assert table.cell_and_offset(0) == (7 * first, 0)
    assert table.cell_and_offset(3) == (7 * first, 3)
    assert table.cell_and_offset(4) == (7 * first + 2, 0)
    assert table.cell_and_offset(11) == (7 * first + 4, 3)
    assert table.cell_and_offset(12) == (7 * second, 0)


@given(layout=LAYOUTS, counts=st.lists(st.integers(0, 30), max_size=8))
def test_every_entry_of_every_layer_has_a_slot_of_its_own(
    layout: PageLayout, counts: list[int]
) -> None:
    pool = PagePool(200)
    tables = [PageTable(layout, pool), PageTable(layout, pool)]
    for number, count in enumerate(counts):
        table = tables[number % 2]
        before, missing, free = table.num_entries, table.pages_needed(count), pool.num_free
        assert table.append(count) == range(before, before + count)
        assert pool.num_free == free - missing
        assert len(table.pages) == layout.pages_for(table.num_entries)
    slots = [
        (cell + layer, slot)
        for table in tables
        for cell, slot in map(table.cell_and_offset, range(table.num_entries))
        for layer in range(layout.layers)
    ]
    assert len(set(slots)) == len(slots)
    assert all(0 <= cell < 200 * layout.layers_per_page for cell, _ in slots)
    assert all(0 <= slot < layout.block_size for _, slot in slots)
    pool.check_integrity([page for table in tables for page in table.pages])
    for table in tables:
        table.clear()
        assert (table.num_entries, list(table.pages), len(table.cells)) == (0, [], 0)
    assert pool.num_free == 200


def test_a_table_that_does_not_fit_stays_as_it_was() -> None:
    pool = PagePool(3)
    table = PageTable(PageLayout(block_size=2, layers=1, layers_per_page=1), pool)
    table.append(3)
    with pytest.raises(CapacityError, match="2 pages are needed, 1 are free"):
        table.append(4)
    assert (table.num_entries, len(table.pages), pool.num_free) == (3, 2, 1)
    table.append(3)
    assert pool.num_free == 0
