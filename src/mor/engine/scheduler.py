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
from mor.engine.request import Chunk, SequenceState

_EXITS_AT_ONCE = 16  # tokens for which coda and head compute as long as their weights take to come


@dataclass(frozen=True, kw_only=True)
class RecursionSpec:
    """What bookkeeping has to know of a model."""

    max_passes: int
    """Passes of the block that a token can take."""
    recursions_per_pass: int
    """Recursions that one pass counts for: 1, or R where sharing='sequence' makes it one pass."""
    shared_kv: bool
    """Whether only the first pass writes keys and values."""
    depth_fractions: tuple[float, ...]
    """Share of tokens expected at each depth, to judge how many pages a prompt will take."""


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """One pass of the block: runs of present tokens."""

    chunks: list[Chunk] = field(default_factory=list)
    """Those that write keys and values come first; within each kind in the order of depths, which
    is an order of all: where some only read, those that write are at depth 0."""
    first_kv_entries: list[int] = field(default_factory=list)
    """Place of each run's first token in its page table."""
    num_writing_chunks: int = 0
    """Chunks that write keys and values."""


@dataclass(frozen=True, kw_only=True)
class PreludePlan:
    """Chunks that enter, and pages to be copied before anything else happens."""

    chunks: list[Chunk] = field(default_factory=list)
    page_copies: list[tuple[int, int]] = field(default_factory=list)


class Scheduler:
    """All sequences, from arrival to the last token."""

    def __init__(
        self,
        config: EngineConfig,
        passes: RecursionSpec,
        pool: PagePool,
        prefix_cache: PrefixCache | None,
    ) -> None:
        self.config = config
        self.recursion_spec = passes
        self.pool = pool
        self.prefix_cache = prefix_cache
        self.waiting: list[SequenceState] = []
        self.running: list[SequenceState] = []
        """Both in order of arrival."""
        self.step_index = 0
        self.num_preemptions = 0
        self._in_block: list[Chunk] = []  # chunks with tokens in the block
        self._exited: list[Chunk] = []  # chunks that wait for the coda
        self.num_state_slots = config.max_num_batched_tokens * (passes.max_passes + 1)
        self._free_state_slots = list(range(self.num_state_slots - 1, -1, -1))

    # -- coming and going -----------------------------------------------------------------------

    def add(self, sequence: SequenceState) -> None:
        """A new sequence; it starts when there is room."""
        insort(self.waiting, sequence, key=lambda s: s.arrival_index)

    def remove(self, sequence: SequenceState) -> None:
        """Take out a sequence that is done or aborted, whatever state it is in."""
        self._drop_chunks(sequence)
        for table in sequence.page_tables:
            table.clear()
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)

    @property
    def has_unfinished(self) -> bool:
        """Whether another tick would do something."""
        return bool(self.waiting or self.running)

    def _drop_chunks(self, sequence: SequenceState) -> None:
        for chunk in sequence.chunks:
            self._free_state_slots.extend(chunk.state_slots)
        sequence.chunks.clear()
        self._in_block = [c for c in self._in_block if c.sequence is not sequence]
        self._exited = [c for c in self._exited if c.sequence is not sequence]

    def _preempt(self, sequence: SequenceState) -> None:
        """Give back its pages; its tokens are computed again later."""
        self._drop_chunks(sequence)
        self.running.remove(sequence)
        sequence.is_running = False
        sequence.reset()
        self.add(sequence)
        self.num_preemptions += 1

    def preempt_all(self) -> None:
        """After a tick that stopped halfway: what is under way is computed again."""
        for sequence in list(self.running):
            self._preempt(sequence)

    def _make_room(self, sequence: SequenceState, table: PageTable, count: int) -> bool:
        """Free pages for `count` more entries; False if the sequence itself had to go.

        Cached prefixes go first, then the youngest sequence.
        """
        missing = table.pages_needed(count)
        while missing > self.pool.num_free:
            if self.prefix_cache is not None:
                self.prefix_cache.evict(missing)
            if missing > self.pool.num_free:
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    return False
        return True

    # -- finish ---------------------------------------------------------------------------------

    def schedule_coda(self) -> list[Chunk]:
        """Chunks for coda and head now: of each sequence in order of position."""
        self.step_index += 1
        if self.config.batching == "sequence" and self._in_block:
            return []
        ready: list[Chunk] = []
        for sequence in dict.fromkeys(chunk.sequence for chunk in self._exited):
            for chunk in sequence.chunks:
                if chunk.active:
                    break  # the coda sees earlier tokens only, so it keeps their order
                ready.append(chunk)
        if not ready or not self._in_block:
            return ready
        waited = self.step_index - min(chunk.exited_at_step for chunk in ready)
        minimum = self.config.min_exit_tokens or min(_EXITS_AT_ONCE, len(self.running) // 2)
        enough = sum(map(len, ready)) >= minimum
        return ready if enough or waited > self.config.max_exit_wait_steps else []

    def update_after_coda(self, chunks: list[Chunk]) -> None:
        """These chunks are through the model."""
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.chunks[0] is chunk, "chunks finish in order"
            sequence.chunks.pop(0)
            self._free_state_slots.extend(chunk.state_slots)
            sequence.recursion_counts[chunk.start : chunk.start + len(chunk)] = (
                chunk.recursion_counts
            )
            sequence.num_computed_tokens += len(chunk)
            self._extend_prefix_cache(sequence)
        done = set(map(id, chunks))
        self._exited = [chunk for chunk in self._exited if id(chunk) not in done]

    def _extend_prefix_cache(self, sequence: SequenceState) -> None:
        """Let the prefix cache know of the tokens that are finished now."""
        if self.prefix_cache is None or not sequence.can_extend_prefix:
            return
        size, tables = self.prefix_cache.block_size, sequence.page_tables
        node = sequence.prefix_node
        start = 0 if node is None else node.num_tokens
        while sequence.num_computed_tokens - start >= size:
            if not self.prefix_cache.contains(node):
                sequence.can_extend_prefix = False
                return
            stop = start + size
            counts = sequence.recursion_counts[start:stop]
            before = node.num_kv_entries if node is not None else (0,) * len(tables)
            added = self._count_kv_entries(sequence, counts)
            entries = [old + new for old, new in zip(before, added, strict=True)]
            node = self.prefix_cache.insert(
                node,
                sequence.prefix_namespace,
                sequence.token_ids[start:stop],
                counts,
                entries,
                tables,
            )
            if node.recursion_counts != tuple(
                counts
            ):  # rounding in another batch moved a router's decision
                sequence.can_extend_prefix = False
                return
            sequence.prefix_node = node
            start = stop

    def _count_kv_entries(self, sequence: SequenceState, counts: list[int]) -> list[int]:
        """Entries that tokens of these recursion counts have in each table."""
        unshared = [len(counts)] if sequence.unshared_table is not None else []
        if self.recursion_spec.shared_kv or self.recursion_spec.max_passes == 1:
            return [*unshared, len(counts)]
        return unshared + [
            sum(c > depth for c in counts) for depth in range(self.recursion_spec.max_passes)
        ]

    def take_all_chunks(self) -> None:
        """Take all chunks out, for a burst, which gives them back with `place`."""
        self._in_block.clear()
        self._exited.clear()

    # -- enter ----------------------------------------------------------------------------------

    def schedule_prelude(self) -> PreludePlan:
        """Tokens that start now: generated ones first, then prompts, then new sequences."""
        plan = PreludePlan()
        if self.config.batching == "sequence" and (self._in_block or self._exited):
            return plan
        budget = self.config.max_num_batched_tokens - sum(
            len(chunk.active) for chunk in self._in_block
        )
        budget = min(budget, len(self._free_state_slots))
        pending = [s for s in self.running if s.num_unscheduled_tokens]
        pending.sort(
            key=lambda s: s.num_unscheduled_tokens > 1
        )  # stable: by arrival within each kind
        for sequence in pending:
            if budget > 0 and sequence.is_running:  # not preempted for another one meanwhile
                budget -= self.schedule_chunk(sequence, budget, plan)
        while budget > 0 and (admitted := self._admit(plan)) is not None:
            budget -= self.schedule_chunk(admitted, budget, plan)
        kept = [c for c in plan.chunks if c in c.sequence.chunks]  # the rest was preempted
        return PreludePlan(chunks=kept, page_copies=plan.page_copies)

    def schedule_chunk(self, sequence: SequenceState, budget: int, plan: PreludePlan) -> int:
        """Enter a chunk of the sequence's next tokens; how many."""
        count = min(sequence.num_unscheduled_tokens, self.config.chunked_prefill_size, budget)
        if sequence.unshared_table is not None:
            if not self._make_room(sequence, sequence.unshared_table, count):
                return 0
            sequence.unshared_table.append(count)
        rows = self._free_state_slots[-count:]
        del self._free_state_slots[-count:]
        chunk = Chunk(sequence=sequence, start=sequence.num_scheduled_tokens, state_slots=rows)
        sequence.num_scheduled_tokens += count
        sequence.chunks.append(chunk)
        plan.chunks.append(chunk)
        return count

    def _admit(self, plan: PreludePlan) -> SequenceState | None:
        """Move the first waiting sequence to the running ones, if there is room for it."""
        if not self.waiting or len(self.running) >= self.config.max_num_seqs:
            return None
        sequence = self.waiting[0]
        if self.running:  # alone it always fits: `add_request` has seen to that
            wanted = self._estimate_pages(sequence) + len(self.running)
            if self.prefix_cache is not None:
                self.prefix_cache.evict(wanted)
            if self.pool.num_free < wanted:
                return None
        self.waiting.pop(0)
        sequence.is_running = True
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.arrival_index)
        self._reuse_prefix(sequence, plan)
        return sequence

    def _estimate_pages(self, sequence: SequenceState) -> int:
        """Pages that the known tokens will probably take, and one more at every depth."""
        count = len(sequence.token_ids)
        unshared = (
            sequence.unshared_table.layout.pages_for(count + 1)
            if sequence.unshared_table is not None
            else 0
        )
        shares = zip(sequence.depth_tables, self.recursion_spec.depth_fractions, strict=False)
        return unshared + sum(t.layout.pages_for(int(count * share) + 1) for t, share in shares)

    def _reuse_prefix(self, sequence: SequenceState, plan: PreludePlan) -> None:
        """Start after the longest prefix that is known."""
        if self.prefix_cache is None:
            return
        nodes = self.prefix_cache.match_prefix(sequence.prefix_namespace, sequence.token_ids)
        if sequence.params.prompt_logprobs:  # they need the states from here on
            last = sequence.params.prompt_logprobs_from - 1
            nodes = [node for node in nodes if node.num_tokens <= last]
        if not nodes or self.pool.num_free < len(sequence.page_tables):
            return
        plan.page_copies.extend(self.prefix_cache.attach(nodes, sequence.page_tables))
        sequence.prefix_node = nodes[-1]
        known = nodes[-1].num_tokens
        sequence.recursion_counts[:known] = [
            count for node in nodes for count in node.recursion_counts
        ]
        sequence.num_scheduled_tokens = sequence.num_computed_tokens = known
        sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)

    def update_after_prelude(self, chunks: list[Chunk], goes_on: list[bool]) -> None:
        """These chunks are through the prelude; `goes_on` says for each token whether it passes
        the first router."""
        at = 0
        for chunk in chunks:
            count = len(chunk)
            chunk.recursion_counts = [0] * count
            forced = chunk.sequence.min_recursions > 0
            flags = goes_on[at : at + count]
            chunk.active = [i for i, on in enumerate(flags) if on or forced]
            at += count
            self.requeue(chunk)

    def requeue(self, chunk: Chunk) -> None:
        """Back into the block, or to those that wait for the coda."""
        if chunk.active:
            self._in_block.append(chunk)
        else:
            chunk.exited_at_step = self.step_index
            self._exited.append(chunk)

    # -- advance --------------------------------------------------------------------------------

    def schedule_block(self) -> BlockPlan:
        """Every present token, with a place for its keys and values."""
        writing: list[tuple[Chunk, int]] = []
        reading: list[Chunk] = []
        for chunk in sorted(self._in_block, key=lambda c: (c.sequence.arrival_index, c.start)):
            sequence = chunk.sequence
            if chunk not in sequence.chunks:  # preempted a moment ago
                continue
            if self.recursion_spec.shared_kv and chunk.depth > 0:
                reading.append(chunk)
                continue
            table = sequence.depth_tables[chunk.depth]
            if self._make_room(sequence, table, len(chunk.active)):
                writing.append((chunk, table.append(len(chunk.active)).start))
        writing = [(c, first) for c, first in writing if c in c.sequence.chunks]
        writing.sort(key=lambda pair: pair[0].depth)
        reading = sorted((c for c in reading if c in c.sequence.chunks), key=lambda c: c.depth)
        return BlockPlan(
            chunks=[c for c, _ in writing] + reading,
            first_kv_entries=[first for _, first in writing] + [0] * len(reading),
            num_writing_chunks=len(writing),
        )

    def update_after_block(self, chunks: list[Chunk], goes_on: list[bool]) -> None:
        """One pass is over; `goes_on` says of each token whether its router sends it on."""
        at, moved = 0, set()
        for chunk in chunks:
            moved.add(id(chunk))
            chunk.depth += 1
            depth, sequence = chunk.depth, chunk.sequence
            flags = goes_on[at : at + len(chunk.active)]
            at += len(chunk.active)
            for i in chunk.active:
                chunk.recursion_counts[i] += self.recursion_spec.recursions_per_pass
            if depth >= self.recursion_spec.max_passes or depth >= sequence.max_recursions:
                chunk.active = []
            elif depth >= sequence.min_recursions:
                chunk.active = [i for i, on in zip(chunk.active, flags, strict=True) if on]
        remaining = [c for c in self._in_block if id(c) not in moved]
        changed = [c for c in self._in_block if id(c) in moved]
        self._in_block = remaining
        for chunk in changed:
            self.requeue(chunk)

    # -- invariants -----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert that every page and every row is held by exactly those who know of it."""
        held = [p for s in self.running for table in s.page_tables for p in table.pages]
        if self.prefix_cache is not None:
            held += self.prefix_cache.cached_pages()
        self.pool.check_integrity(held)
        rows = [row for s in self.running for chunk in s.chunks for row in chunk.state_slots]
        assert sorted(rows + self._free_state_slots) == list(range(self.num_state_slots)), (
            "rows leaked"
        )
        in_flight = {id(c) for s in self.running for c in s.chunks}
        assert in_flight == set(map(id, self._in_block + self._exited)), "chunks leaked"
        assert all(not t.pages for s in self.waiting for t in s.page_tables), "waiting with pages"
        for sequence in self.running:
            assert sequence.num_scheduled_tokens == sequence.num_computed_tokens + sum(
                map(len, sequence.chunks)
            )
