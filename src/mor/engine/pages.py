"""Key-value memory as bookkeeping: which pages are free, and which entries lie where.

- KV entry: the keys and values of one token in all layers of a stack (the block at one depth, or
  prelude and coda together). vLLM's nearest word is a slot.
- cell: `block_size` entries of one layer; a slot of the memory is (cell, offset in it).
- cell group: neighboring cells, one for each layer of the stack: `block_size` entries.
- page: `layers_per_page` neighboring cells, the unit that is allocated. vLLM's word is block,
  which here means the shared layers.

One pool serves the block at every depth and the unshared layers. Their stacks may differ in height,
so a page is as high as the higher one, and a lower stack lays several cell groups side by side in
it. With 6 layers per page, `block_size` 4, and a stack of 3 layers, page 1 of the pool is:

    cell   6     7     8     9     10    11
    layer  0     1     2     0     1     2
    entry  0-3   0-3   0-3   4-7   4-7   4-7
           cell group 0      cell group 1

Plain Python: no tensors here.
"""

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from mor.errors import CapacityError


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """How the KV entries of one kind of table lie in pages.

    A table's entry e is in page e // entries_per_page, and there in the group of cells of its
    run of `block_size` entries.
    """

    block_size: int
    """S, entries of a cell; a field of `EngineConfig`."""
    layers: int
    """Layers of the stack, which are the cells of a group."""
    layers_per_page: int

    @property
    def cell_groups(self) -> int:
        """Groups of cells in a page."""
        return self.layers_per_page // self.layers

    @property
    def entries_per_page(self) -> int:
        """Entries, one for each token, that a page holds."""
        return self.block_size * self.cell_groups

    def pages_for(self, entries: int) -> int:
        """Pages that this many entries take."""
        return -(-entries // self.entries_per_page)


class PagePool:
    """Pages with reference counts: a page is free when nobody holds it."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._ref_counts = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that can be allocated."""
        return len(self._free)

    def allocate(self) -> int:
        """Take a free page; its reference count becomes 1.

        Raises:
            CapacityError: no page is free.
        """
        if not self._free:
            raise CapacityError(f"all {self.num_pages} pages are in use.")
        page = self._free.pop()
        self._ref_counts[page] = 1
        return page

    def incref(self, page: int) -> None:
        """Count one more holder of a page that is in use."""
        assert self._ref_counts[page] > 0, f"page {page} is free"
        self._ref_counts[page] += 1

    def decref(self, page: int) -> None:
        """Count one holder less; without any the page is free again."""
        assert self._ref_counts[page] > 0, f"page {page} is free"
        self._ref_counts[page] -= 1
        if self._ref_counts[page] == 0:
            self._free.append(page)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Assert that each page's reference count is the number of its occurrences in `held`.

        And that exactly the pages that nobody holds are free, each once.
        """
        counts = Counter(held)
        wrong = [page for page, count in enumerate(self._ref_counts) if count != counts[page]]
        assert not wrong, f"pages {wrong} leaked"
        unheld = [page for page, count in enumerate(self._ref_counts) if count == 0]
        assert sorted(self._free) == unheld, "free pages and reference counts disagree"


class PageTable:
    """The pages of one sequence at one depth, or in its unshared layers, in order of entries."""

    def __init__(self, layout: PageLayout, pool: PagePool) -> None:
        self.layout = layout
        self.pages: list[int] = []
        self.cells = array("i")
        """Cell of the stack's first layer, for each run of `block_size` entries."""
        self.num_entries = 0
        self._pool = pool

    def pages_needed(self, count: int) -> int:
        """Pages to allocate before `count` more entries fit; negative if more are reserved."""
        return self.layout.pages_for(self.num_entries + count) - len(self.pages)

    def append(self, count: int) -> range:
        """Add `count` entries; the range of their indices.

        Raises:
            CapacityError: not enough pages are free; nothing has changed then.
        """
        self.reserve(count)
        first = self.num_entries
        self.num_entries += count
        return range(first, self.num_entries)

    def reserve(self, count: int) -> None:
        """Allocate the pages of `count` more entries, without adding these.

        Raises:
            CapacityError: not enough pages are free; nothing has changed then.
        """
        missing = self.pages_needed(count)
        if missing > self._pool.num_free:
            raise CapacityError(f"{missing} pages are needed, {self._pool.num_free} are free.")
        for _ in range(missing):
            self.append_page(self._pool.allocate())

    def release_unused(self) -> None:
        """Release pages that hold no entry."""
        while len(self.pages) > self.layout.pages_for(self.num_entries):
            self._pool.decref(self.pages.pop())
            del self.cells[-self.layout.cell_groups :]

    def append_page(self, page: int) -> None:
        """Add a page whose reference count includes this table already."""
        start = page * self.layout.layers_per_page
        step = self.layout.layers
        self.pages.append(page)
        self.cells.extend(start + group * step for group in range(self.layout.cell_groups))

    def cell_and_offset(self, entry: int) -> tuple[int, int]:
        """(cell of the stack's first layer, offset in it) of an entry."""
        size = self.layout.block_size
        return self.cells[entry // size], entry % size

    def clear(self) -> None:
        """Release all pages."""
        for page in self.pages:
            self._pool.decref(page)
        self.pages.clear()
        del self.cells[:]
        self.num_entries = 0
