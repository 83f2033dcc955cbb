"""Who runs when: continuous depth-wise batching.

A tick has three phases, and each is planned with full knowledge of the one before:

    finish   tokens that have left the block -> coda, head, sampling
    enter    sampled tokens and prompt chunks -> embedding, prelude, first routing decision
    advance  one pass of the shared block over all present tokens, whatever their depth

Plain Python: plans are data, the runner turns them into tensors.
"""

from bisect import insort
from dataclasses import dataclass, field

from mor.engine.config import EngineConfig
from mor.engine.pages import PagePool, PageTable
from mor.engine.prefix import PrefixCache
from mor.engine.request import Chunk, Sequence

_EXITS_AT_ONCE = 16  # tokens for which coda and head compute as long as their weights take to come


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What bookkeeping has to know of a model."""

    most: int
    """Passes of the block that a token can take."""
    recursions: int
    """Recursions that one pass counts for: 1, or R where sharing='sequence' makes it one pass."""
    shared_kv: bool
    """Whether only the first pass writes keys and values."""
    presence: tuple[float, ...]
    """Share of tokens expected at each depth, to judge how many pages a prompt will take."""


@dataclass(frozen=True, kw_only=True)
class AdvancePlan:
    """One pass of the block: runs of present tokens."""

    chunks: list[Chunk] = field(default_factory=list)
    """Those that write keys and values come first; within each kind in the order of depths, which
    is an order of all: where some only read, those that write are at depth 0."""
    first_entries: list[int] = field(default_factory=list)
    """Place of each run's first token in its page table."""
    num_writing: int = 0
    """Chunks that write keys and values."""


@dataclass(frozen=True, kw_only=True)
class EnterPlan:
    """Chunks that enter, and pages to be copied before anything else happens."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


class Scheduler:
    """All sequences, from arrival to the last token."""

    def __init__(
        self, config: EngineConfig, passes: Passes, pool: PagePool, prefixes: PrefixCache | None
    ) -> None:
        self.config = config
        self.passes = passes
        self.pool = pool
        self.prefixes = prefixes
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        """Both in order of arrival."""
        self.tick = 0
        self.num_preemptions = 0
        self._present: list[Chunk] = []  # chunks with tokens in the block
        self._left: list[Chunk] = []  # chunks that wait for the coda
        self.num_rows = config.max_lanes * (passes.most + 1)
        self._free_rows = list(range(self.num_rows - 1, -1, -1))

    # -- coming and going -----------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """A new sequence; it starts when there is room."""
        insort(self.waiting, sequence, key=lambda s: s.order)

    def close(self, sequence: Sequence) -> None:
        """Take out a sequence that is done or aborted, whatever state it is in."""
        self._drop_chunks(sequence)
        for table in sequence.tables:
            table.clear()
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)

    @property
    def has_work(self) -> bool:
        """Whether another tick would do something."""
        return bool(self.waiting or self.running)

    def _drop_chunks(self, sequence: Sequence) -> None:
        for chunk in sequence.chunks:
            self._free_rows.extend(chunk.rows)
        sequence.chunks.clear()
        self._present = [c for c in self._present if c.sequence is not sequence]
        self._left = [c for c in self._left if c.sequence is not sequence]

    def _preempt(self, sequence: Sequence) -> None:
        """Give back its pages; its tokens are computed again later."""
        self._drop_chunks(sequence)
        self.running.remove(sequence)
        sequence.is_running = False
        sequence.reset()
        self.add(sequence)
        self.num_preemptions += 1

    def restart(self) -> None:
        """After a tick that stopped halfway: what is under way is computed again."""
        for sequence in list(self.running):
            self._preempt(sequence)

    def _make_room(self, sequence: Sequence, table: PageTable, count: int) -> bool:
        """Free pages for `count` more entries; False if the sequence itself had to go.

        Cached prefixes go first, then the youngest sequence.
        """
        missing = table.missing(count)
        while missing > self.pool.num_free:
            if self.prefixes is not None:
                self.prefixes.evict(missing)
            if missing > self.pool.num_free:
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    return False
        return True

    # -- finish ---------------------------------------------------------------------------------

    def plan_finish(self) -> list[Chunk]:
        """Chunks for coda and head now: of each sequence in order of position."""
        self.tick += 1
        if self.config.batching == "sequence" and self._present:
            return []
        ready: list[Chunk] = []
        for sequence in dict.fromkeys(chunk.sequence for chunk in self._left):
            for chunk in sequence.chunks:
                if chunk.present:
                    break  # the coda sees earlier tokens only, so it keeps their order
                ready.append(chunk)
        if not ready or not self._present:
            return ready
        waited = self.tick - min(chunk.left_at for chunk in ready)
        least = self.config.least_exit_batch or min(_EXITS_AT_ONCE, len(self.running) // 2)
        enough = sum(map(len, ready)) >= least
        return ready if enough or waited > self.config.longest_exit_wait else []

    def finished(self, chunks: list[Chunk]) -> None:
        """These chunks are through the model."""
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.chunks[0] is chunk, "chunks finish in order"
            sequence.chunks.pop(0)
            self._free_rows.extend(chunk.rows)
            sequence.counts[chunk.start : chunk.start + len(chunk)] = chunk.counts
            sequence.num_finished += len(chunk)
            self._remember(sequence)
        done = set(map(id, chunks))
        self._left = [chunk for chunk in self._left if id(chunk) not in done]

    def _remember(self, sequence: Sequence) -> None:
        """Let the prefix cache know of the tokens that are finished now."""
        if self.prefixes is None or not sequence.prefix_open:
            return
        size, tables = self.prefixes.page_size, sequence.tables
        node = sequence.prefix_node
        start = 0 if node is None else node.num_tokens
        while sequence.num_finished - start >= size:
            if not self.prefixes.holds(node):
                sequence.prefix_open = False
                return
            stop = start + size
            counts = sequence.counts[start:stop]
            before = node.entries if node is not None else (0,) * len(tables)
            added = self._entries(sequence, counts)
            entries = [old + new for old, new in zip(before, added, strict=True)]
            node = self.prefixes.insert(
                node, sequence.prefix_root, sequence.tokens[start:stop], counts, entries, tables
            )
            if node.counts != tuple(counts):  # rounding in another batch moved a router's decision
                sequence.prefix_open = False
                return
            sequence.prefix_node = node
            start = stop

    def _entries(self, sequence: Sequence, counts: list[int]) -> list[int]:
        """Entries that tokens of these recursion counts have in each table."""
        outer = [len(counts)] if sequence.outer is not None else []
        if self.passes.shared_kv or self.passes.most == 1:
            return [*outer, len(counts)]
        return outer + [sum(c > depth for c in counts) for depth in range(self.passes.most)]

    def lift(self) -> None:
        """Take all chunks out, for a burst, which gives them back with `place`."""
        self._present.clear()
        self._left.clear()

    # -- enter ----------------------------------------------------------------------------------

    def plan_enter(self) -> EnterPlan:
        """Tokens that start now: generated ones first, then prompts, then new sequences."""
        plan = EnterPlan()
        if self.config.batching == "sequence" and (self._present or self._left):
            return plan
        budget = self.config.max_lanes - sum(len(chunk.present) for chunk in self._present)
        budget = min(budget, len(self._free_rows))
        pending = [s for s in self.running if s.num_waiting]
        pending.sort(key=lambda s: s.num_waiting > 1)  # stable: by arrival within each kind
        for sequence in pending:
            if budget > 0 and sequence.is_running:  # not preempted for another one meanwhile
                budget -= self.enter(sequence, budget, plan)
        while budget > 0 and (admitted := self._admit(plan)) is not None:
            budget -= self.enter(admitted, budget, plan)
        kept = [c for c in plan.chunks if c in c.sequence.chunks]  # the rest was preempted
        return EnterPlan(chunks=kept, copies=plan.copies)

    def enter(self, sequence: Sequence, budget: int, plan: EnterPlan) -> int:
        """Enter a chunk of the sequence's next tokens; how many."""
        count = min(sequence.num_waiting, self.config.prefill_chunk, budget)
        if sequence.outer is not None:
            if not self._make_room(sequence, sequence.outer, count):
                return 0
            sequence.outer.append(count)
        rows = self._free_rows[-count:]
        del self._free_rows[-count:]
        chunk = Chunk(sequence=sequence, start=sequence.num_entered, rows=rows)
        sequence.num_entered += count
        sequence.chunks.append(chunk)
        plan.chunks.append(chunk)
        return count

    def _admit(self, plan: EnterPlan) -> Sequence | None:
        """Move the first waiting sequence to the running ones, if there is room for it."""
        if not self.waiting or len(self.running) >= self.config.max_sequences:
            return None
        sequence = self.waiting[0]
        if self.running:  # alone it always fits: `add_request` has seen to that
            wanted = self._pages_expected(sequence) + len(self.running)
            if self.prefixes is not None:
                self.prefixes.evict(wanted)
            if self.pool.num_free < wanted:
                return None
        self.waiting.pop(0)
        sequence.is_running = True
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.order)
        self._reuse_prefix(sequence, plan)
        return sequence

    def _pages_expected(self, sequence: Sequence) -> int:
        """Pages that the known tokens will probably take, and one more at every depth."""
        count = len(sequence.tokens)
        outer = sequence.outer.layout.pages_for(count + 1) if sequence.outer is not None else 0
        shares = zip(sequence.depths, self.passes.presence, strict=False)
        return outer + sum(t.layout.pages_for(int(count * share) + 1) for t, share in shares)

    def _reuse_prefix(self, sequence: Sequence, plan: EnterPlan) -> None:
        """Start after the longest prefix that is known."""
        if self.prefixes is None:
            return
        nodes = self.prefixes.find(sequence.prefix_root, sequence.tokens)
        if sequence.params.prompt_logprobs:  # they need the states from here on
            last = sequence.params.prompt_logprobs_from - 1
            nodes = [node for node in nodes if node.num_tokens <= last]
        if not nodes or self.pool.num_free < len(sequence.tables):
            return
        plan.copies.extend(self.prefixes.attach(nodes, sequence.tables))
        sequence.prefix_node = nodes[-1]
        known = nodes[-1].num_tokens
        sequence.counts[:known] = [count for node in nodes for count in node.counts]
        sequence.num_entered = sequence.num_finished = known
        sequence.num_cached = min(sequence.num_finished, sequence.num_prompt)

    def entered(self, chunks: list[Chunk], goes_on: list[bool]) -> None:
        """These chunks are through the prelude; `goes_on` says for each token whether it passes
        the first router."""
        at = 0
        for chunk in chunks:
            count = len(chunk)
            chunk.counts = [0] * count
            forced = chunk.sequence.least > 0
            flags = goes_on[at : at + count]
            chunk.present = [i for i, on in enumerate(flags) if on or forced]
            at += count
            self.place(chunk)

    def place(self, chunk: Chunk) -> None:
        """Back into the block, or to those that wait for the coda."""
        if chunk.present:
            self._present.append(chunk)
        else:
            chunk.left_at = self.tick
            self._left.append(chunk)

    # -- advance --------------------------------------------------------------------------------

    def plan_advance(self) -> AdvancePlan:
        """Every present token, with a place for its keys and values."""
        writing: list[tuple[Chunk, int]] = []
        reading: list[Chunk] = []
        for chunk in sorted(self._present, key=lambda c: (c.sequence.order, c.start)):
            sequence = chunk.sequence
            if chunk not in sequence.chunks:  # preempted a moment ago
                continue
            if self.passes.shared_kv and chunk.depth > 0:
                reading.append(chunk)
                continue
            table = sequence.depths[chunk.depth]
            if self._make_room(sequence, table, len(chunk.present)):
                writing.append((chunk, table.append(len(chunk.present)).start))
        writing = [(c, first) for c, first in writing if c in c.sequence.chunks]
        writing.sort(key=lambda pair: pair[0].depth)
        reading = sorted((c for c in reading if c in c.sequence.chunks), key=lambda c: c.depth)
        return AdvancePlan(
            chunks=[c for c, _ in writing] + reading,
            first_entries=[first for _, first in writing] + [0] * len(reading),
            num_writing=len(writing),
        )

    def advanced(self, chunks: list[Chunk], goes_on: list[bool]) -> None:
        """One pass is over; `goes_on` says of each token whether its router sends it on."""
        at, moved = 0, set()
        for chunk in chunks:
            moved.add(id(chunk))
            chunk.depth += 1
            depth, sequence = chunk.depth, chunk.sequence
            flags = goes_on[at : at + len(chunk.present)]
            at += len(chunk.present)
            for i in chunk.present:
                chunk.counts[i] += self.passes.recursions
            if depth >= self.passes.most or depth >= sequence.most:
                chunk.present = []
            elif depth >= sequence.least:
                chunk.present = [i for i, on in zip(chunk.present, flags, strict=True) if on]
        remaining = [c for c in self._present if id(c) not in moved]
        changed = [c for c in self._present if id(c) in moved]
        self._present = remaining
        for chunk in changed:
            self.place(chunk)

    # -- invariants -----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert that every page and every row is held by exactly those who know of it."""
        held = [p for s in self.running for table in s.tables for p in table.pages]
        if self.prefixes is not None:
            held += self.prefixes.held_pages()
        self.pool.check_integrity(held)
        rows = [row for s in self.running for chunk in s.chunks for row in chunk.rows]
        assert sorted(rows + self._free_rows) == list(range(self.num_rows)), "rows leaked"
        in_flight = {id(c) for s in self.running for c in s.chunks}
        assert in_flight == set(map(id, self._present + self._left)), "chunks leaked"
        assert all(not t.pages for s in self.waiting for t in s.tables), "waiting with pages"
        for sequence in self.running:
            assert sequence.num_entered == sequence.num_finished + sum(map(len, sequence.chunks))
