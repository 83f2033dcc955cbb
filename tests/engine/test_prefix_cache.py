"""The prefix cache: what it finds is what was computed, and its pages are never lost."""

import random

import pytest

from mor.engine.pages import PageLayout, PagePool, PageTable
from mor.engine.prefix import PrefixCache, PrefixNode

SIZE = 4
ROOT = (0, 3)
OTHER_ROOT = (0, 1)
LAYOUTS = (
    PageLayout(block_size=SIZE, layers=1, layers_per_page=2),  # the unshared layers: 8 to a page
    PageLayout(block_size=SIZE, layers=2, layers_per_page=2),  # depth 0
    PageLayout(block_size=SIZE, layers=2, layers_per_page=2),  # depth 1
)


class Writer:
    """A sequence whose entries are written down instead of computed."""

    def __init__(self, cache: PrefixCache, pool: PagePool, written: dict[tuple[int, int], object]):
        self.cache, self.pool, self.written = cache, pool, written
        self.tables = [PageTable(layout, pool) for layout in LAYOUTS]
        self.node: PrefixNode | None = None
        self.tokens: list[int] = []

    def begin(self, tokens: list[int], root: tuple[int, int] = ROOT) -> int:
        """Reuse what is known of these tokens; how many are."""
        nodes = self.cache.match_prefix(root, tokens)
        for source, target in self.cache.attach(nodes, self.tables):
            for slot in range(8):
                if (source, slot) in self.written:
                    self.written[target, slot] = self.written[source, slot]
        known = nodes[-1].num_tokens if nodes else 0
        self.node = nodes[-1] if nodes else None
        self.tokens = tokens[:known]
        return known

    def write(self, tokens: list[int], root: tuple[int, int] = ROOT) -> None:
        """Go on with tokens; an odd one goes to depth 1, too."""
        for token in tokens:
            self.tokens.append(token)
            for table, there in zip(self.tables, (True, True, token % 2 == 1), strict=True):
                if there:
                    (entry,) = table.append(1)
                    page, slot = divmod(entry, table.layout.entries_per_page)
                    self.written[table.pages[page], slot] = tuple(self.tokens)
            if len(self.tokens) % SIZE == 0:
                new = self.tokens[-SIZE:]
                counts = [1 + token % 2 for token in new]
                entries = [table.num_entries for table in self.tables]
                self.node = self.cache.insert(self.node, root, new, counts, entries, self.tables)

    def check(self) -> None:
        """All entries are those of the own tokens."""
        stages = [tuple(self.tokens[: i + 1]) for i in range(len(self.tokens))]
        wanted = (stages, stages, [s for s in stages if s[-1] % 2 == 1])
        for table, want in zip(self.tables, wanted, strict=True):
            per_page = table.layout.entries_per_page
            places = [divmod(entry, per_page) for entry in range(table.num_entries)]
            assert [self.written[table.pages[page], slot] for page, slot in places] == want

    def end(self) -> None:
        """Give everything back."""
        for table in self.tables:
            table.clear()


@pytest.fixture
def pool() -> PagePool:
    return PagePool(400)


@pytest.fixture
def cache(pool: PagePool) -> PrefixCache:
    return PrefixCache(pool, SIZE)


def check_pages(cache: PrefixCache, pool: PagePool, *writers: Writer) -> None:
    pages = [page for writer in writers for table in writer.tables for page in table.pages]
    pool.check_integrity([*cache.cached_pages(), *pages])


def test_the_last_token_is_never_taken_from_the_cache(cache: PrefixCache, pool: PagePool) -> None:
    writer = Writer(cache, pool, {})
    writer.write(list(range(12)))
    assert len(cache) == 3
    assert [n.num_tokens for n in cache.match_prefix(ROOT, list(range(13)))] == [4, 8, 12]
    assert [n.num_tokens for n in cache.match_prefix(ROOT, list(range(12)))] == [4, 8]
    assert [n.num_tokens for n in cache.match_prefix(ROOT, [*range(7), 99, 8, 9])] == [4]
    assert cache.match_prefix(ROOT, [99, *range(12)]) == []
    assert cache.match_prefix(ROOT, [0, 1, 2, 3]) == []
    assert cache.match_prefix(OTHER_ROOT, list(range(13))) == []


def test_a_prefix_brings_its_counts_and_entries(cache: PrefixCache, pool: PagePool) -> None:
    Writer(cache, pool, {}).write([1, 2, 4, 5, 7, 7, 7, 8])
    first, second = cache.match_prefix(ROOT, [1, 2, 4, 5, 7, 7, 7, 8, 0])
    assert (first.recursion_counts, second.recursion_counts) == ((2, 1, 1, 2), (2, 2, 2, 1))
    assert (first.num_kv_entries, second.num_kv_entries) == ((4, 4, 2), (8, 8, 5))
    assert second.parent is first
    assert (first.num_children, second.num_children) == (1, 0)


def test_only_a_begun_page_is_copied(cache: PrefixCache, pool: PagePool) -> None:
    first = Writer(cache, pool, {})
    first.write([1, 2, 4, 5, 9])  # unshared: 4 of 8, depth 0: 4 of 4, depth 1: 2 of 4
    second = Writer(cache, pool, first.written)
    copies = cache.attach(cache.match_prefix(ROOT, [1, 2, 4, 5, 9]), second.tables)
    assert [source for source, _ in copies] == [first.tables[0].pages[0], first.tables[2].pages[0]]
    assert [target for _, target in copies] == [
        second.tables[0].pages[0],
        second.tables[2].pages[0],
    ]
    assert second.tables[1].pages == first.tables[1].pages[:1]
    assert [table.num_entries for table in second.tables] == [4, 4, 2]
    check_pages(cache, pool, first, second)


def test_a_prefix_outlives_its_writer(cache: PrefixCache, pool: PagePool) -> None:
    first = Writer(cache, pool, {})
    first.write([1, 2, 3, 4, 5, 6])
    first.end()
    check_pages(cache, pool)
    second = Writer(cache, pool, first.written)
    assert second.begin([1, 2, 3, 4, 7]) == 4
    second.write([7, 8, 9])
    second.check()
    second.end()
    cache.clear()
    assert (len(cache), pool.num_free) == (0, 400)


def test_the_same_prefix_is_kept_once(cache: PrefixCache, pool: PagePool) -> None:
    written: dict[tuple[int, int], object] = {}
    writers = [Writer(cache, pool, written) for _ in range(2)]
    for token in (1, 2, 3, 4, 5, 6, 7, 8, 9):  # at the same time: neither knows of the other
        for writer in writers:
            writer.write([token])
    assert len(cache) == 2
    assert writers[0].node is writers[1].node
    for writer in writers:
        writer.check()
    check_pages(cache, pool, *writers)


def test_leaves_go_first_and_the_least_recently_used_of_them(
    cache: PrefixCache, pool: PagePool
) -> None:
    for tokens in ([1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 3, 3, 3, 3], [5] * 8):
        writer = Writer(cache, pool, {})
        writer.begin(tokens)
        writer.write(tokens[len(writer.tokens) :])
        writer.end()
    cache.match_prefix(ROOT, [1, 1, 1, 1, 2, 2, 2, 2, 0])
    gone = []
    while len(cache):
        cache.evict(pool.num_free + 1)
        known = {
            name
            for name, tokens in (("2", [1] * 4 + [2] * 4), ("3", [1] * 4 + [3] * 4), ("5", [5] * 8))
            if cache._nodes and len(_peek(cache, tokens)) == 2
        }
        gone.append("".join(sorted(known)))
        check_pages(cache, pool)
    assert gone[0] == "25"  # 3 was used least recently
    assert gone[1] == "2"
    assert gone[-1] == ""
    assert pool.num_free == 400


def _peek(cache: PrefixCache, tokens: list[int]) -> list[PrefixNode]:
    """Like `find`, but it leaves the order of use alone."""
    found: list[PrefixNode] = []
    for start in range(0, len(tokens), SIZE):
        above = id(found[-1]) if found else ROOT
        node = cache._nodes.get((above, tuple(tokens[start : start + SIZE])))
        if node is None:
            break
        found.append(node)
    return found


def test_a_dropped_node_is_known_to_be_gone(cache: PrefixCache, pool: PagePool) -> None:
    writer = Writer(cache, pool, {})
    writer.write([1, 2, 3, 4])
    assert cache.contains(writer.node)
    assert cache.contains(None)
    old = writer.node
    cache.clear()
    assert not cache.contains(old)
    writer.end()
    again = Writer(cache, pool, {})
    again.write([1, 2, 3, 4])
    assert cache.contains(again.node)
    assert not cache.contains(old)


@pytest.mark.parametrize("seed", range(6))
def test_any_writers_find_only_what_is_theirs(seed: int) -> None:
    rng, pool = random.Random(seed), PagePool(60)
    cache, written = PrefixCache(pool, SIZE), {}
    writers: list[Writer] = []
    hits = 0
    for _ in range(300):
        for writer in [w for w in writers if rng.random() < 0.3 or pool.num_free < 8]:
            writer.end()
            writers.remove(writer)
        if pool.num_free < 24:
            cache.evict(24)
        if pool.num_free >= 24 and len(writers) < 4:
            writer = Writer(cache, pool, written)
            tokens = [rng.choice((0, 1)) for _ in range(rng.randint(1, 14))]
            hits += writer.begin(tokens) > 0
            writer.write(tokens[len(writer.tokens) :])
            writers.append(writer)
        for writer in writers:
            writer.check()
        check_pages(cache, pool, *writers)
    assert hits > 20
