"""Prefix cache: the KV entries of a prefix of tokens serve every request that starts with it.

Routing by threshold looks at nothing but the tokens so far, so a prefix has the same entries at
every depth whoever computes it: sharing is exact. A node of the tree stands for `block_size` tokens
after its parent, and holds the pages that their entries touch, in every table of a sequence.

A prefix ends at a page's border in the unshared layers' table, but rarely in a depth's table, where
only some of the tokens have entries. With `block_size` 16 and one cell group per page, a prefix of
16 tokens of which 11 reached depth 1 has at depth 1:

    entries    | holder                                    | who may write
    0 .. 10    | the node: its first owner's page, shared  | nobody any more
    11 .. 15   | the same page, not yet filled             | its first owner only, who goes on

Entries are only ever appended, so the node may hold a page that its first owner goes on filling.
Whoever reuses the prefix shares whole pages, and gets a copy of the last one where it is begun:
there it appends its own entries. Plain Python: no tensors here.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from mor.engine.pages import PagePool, PageTable


@dataclass(eq=False, kw_only=True)
class PrefixNode:
    """`block_size` tokens after those of the parent, and where their KV entries are."""

    parent: "PrefixNode | None"
    namespace: Hashable
    """Requests of different namespaces (e.g. other recursion limits) share nothing."""
    token_ids: tuple[int, ...]
    recursion_counts: tuple[int, ...]
    """Recursion count of each token."""
    num_kv_entries: tuple[int, ...]
    """For each table of a sequence, its number of entries after these tokens."""
    pages: tuple[tuple[int, ...], ...]
    """For each table, the pages that hold the entries of these tokens. The first one may hold
    entries of the parent, too; the last one may be partly filled."""
    num_tokens: int
    """Tokens of the whole prefix, those of all ancestors included."""
    num_children: int = 0

    @property
    def key(self) -> tuple[Hashable, tuple[int, ...]]:
        """Key in the cache: the parent (or namespace) and these tokens."""
        return (self.namespace if self.parent is None else id(self.parent), self.token_ids)


class PrefixCache:
    """A tree of prefixes; the least recently used leaf goes first when pages are needed."""

    def __init__(self, pool: PagePool, block_size: int) -> None:
        self.block_size = block_size
        self._pool = pool
        self._nodes: OrderedDict[tuple[Hashable, tuple[int, ...]], PrefixNode] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def match_prefix(self, namespace: Hashable, tokens: Sequence[int]) -> list[PrefixNode]:
        """The nodes of the longest known prefix, from the first on; one token stays uncovered."""
        found: list[PrefixNode] = []
        size, above = self.block_size, namespace
        for start in range(0, len(tokens) - size, size):
            node = self._nodes.get((above, tuple(tokens[start : start + size])))
            if node is None:
                break
            found.append(node)
            above = id(node)
        for node in reversed(found):  # the root's child last: leaves must be evicted before it
            self._nodes.move_to_end(node.key)
        return found

    def attach(
        self, nodes: Sequence[PrefixNode], tables: Sequence[PageTable]
    ) -> list[tuple[int, int]]:
        """Give empty tables the entries of a prefix; the (from, to) pages to be copied.

        Raises:
            CapacityError: no page is free for a copy; the tables are then to be cleared.
        """
        copies: list[tuple[int, int]] = []
        for number, table in enumerate(tables):
            per_page = table.layout.entries_per_page
            pages: list[int] = []
            num_entries = 0  # of the prefix so far
            for node in nodes:
                # A node's first page may be its parent's last one, if that was only partly filled;
                # the node's own version of it counts, since another owner may have copied it.
                pages[num_entries // per_page :] = node.pages[number]
                num_entries = node.num_kv_entries[number]
            num_full = num_entries // per_page
            for page in pages[:num_full]:
                self._pool.incref(page)
                table.append_page(page)
            if num_entries % per_page:  # partly filled: its first owner may go on writing there
                own = self._pool.allocate()
                copies.append((pages[num_full], own))
                table.append_page(own)
            table.num_entries = num_entries
        return copies

    def insert(
        self,
        parent: PrefixNode | None,
        namespace: Hashable,
        tokens: Sequence[int],
        counts: Sequence[int],
        entries: Sequence[int],
        tables: Sequence[PageTable],
    ) -> PrefixNode:
        """The node of `block_size` finished tokens after `parent`: the known one, or a new one.

        Args:
            parent: None where the prefix begins.
            counts: recursion count of each token.
            entries: for each table, its number of entries after these tokens.
            tables: page tables of the sequence that computed the tokens; it keeps its own pages.
        """
        key = (namespace if parent is None else id(parent), tuple(tokens))
        if key in self._nodes:
            self._nodes.move_to_end(key)
            return self._nodes[key]
        # From the page that holds the first new entry to the one that holds the last.
        before = parent.num_kv_entries if parent is not None else (0,) * len(tables)
        pages = tuple(
            tuple(t.pages[old // t.layout.entries_per_page : t.layout.pages_for(new)])
            for t, old, new in zip(tables, before, entries, strict=True)
        )
        node = PrefixNode(
            parent=parent,
            namespace=namespace,
            token_ids=tuple(tokens),
            recursion_counts=tuple(counts),
            num_kv_entries=tuple(entries),
            pages=pages,
            num_tokens=len(tokens) + (0 if parent is None else parent.num_tokens),
        )
        for page in self._pages_of(node):
            self._pool.incref(page)
        if parent is not None:
            parent.num_children += 1
        self._nodes[key] = node
        return node

    def contains(self, node: PrefixNode | None) -> bool:
        """Whether a node is still in the tree (None, the root's place, always is)."""
        return node is None or self._nodes.get(node.key) is node

    def evict(self, num_free: int) -> None:
        """Drop leaves, the least recently used first (or all), until `num_free` pages are free."""
        while self._pool.num_free < num_free and self._nodes:
            leaf = next(node for node in self._nodes.values() if node.num_children == 0)
            self._drop(leaf)

    def clear(self) -> None:
        """Drop all nodes, children before their parents."""
        while self._nodes:
            self._drop(next(n for n in reversed(self._nodes.values()) if n.num_children == 0))

    def _drop(self, node: PrefixNode) -> None:
        """Remove a node without children, and release its pages."""
        del self._nodes[node.key]
        if node.parent is not None:
            node.parent.num_children -= 1
        for page in self._pages_of(node):
            self._pool.decref(page)

    def _pages_of(self, node: PrefixNode) -> list[int]:
        return [page for pages in node.pages for page in pages]

    def cached_pages(self) -> list[int]:
        """Every page that a node holds, once for each node."""
        return [page for node in self._nodes.values() for page in self._pages_of(node)]
