"""Which tokens run when: continuous depth-wise batching.

A step has three phases (see `mor.engine.plan`): coda, prelude, block. Each is planned when the one
before is over, so that a token which leaves the block, is sampled, and enters again loses no step.

Invariants (`check_integrity` asserts the first five):

- A sequence is in `waiting` or in `running`, both in order of arrival; only the latter hold pages.
- `num_scheduled_tokens` = `num_computed_tokens` + the tokens of the sequence's chunks in flight.
- A chunk in flight is in `_in_block` (some token is active) or in `_exited` (none is), never both.
- A state slot is free or belongs to one token of one chunk.
- A page is free, or its reference count is the number of tables and cached prefixes that hold it.
- Every chunk in the block takes a pass in every step, so a sequence's earlier chunk reaches each
  depth before a later one: the KV entries of a table are in order of position.
- A sequence's chunks leave in order of position, too: a coda layer sees all earlier tokens.
- When pages run out, cached prefixes go first, then the youngest running sequence is preempted: so
  the oldest one always gets on, and with it the engine.
- At most `max_num_batched_tokens` tokens take a pass of the block, at most `max_num_seqs` run.

Plain Python: plans are data, the model runner turns them into tensors.
"""

from bisect import insort
from collections.abc import Sequence

from mor.engine.config import EngineConfig
from mor.engine.pages import PagePool, PageTable
from mor.engine.plan import (
    BlockOutput,
    BlockPlan,
    CodaPlan,
    PreludeOutput,
    PreludePlan,
    make_sampling_input,
)
from mor.engine.prefix import PrefixCache
from mor.engine.request import Chunk, SequenceState
from mor.model.sharing import RecursionSpec

_EXITS_AT_ONCE = 16  # tokens for which coda and head compute as long as reading their weights takes


class Scheduler:
    """All sequences, from arrival to the last token."""

    def __init__(
        self,
        config: EngineConfig,
        recursion_spec: RecursionSpec,
        pool: PagePool,
        prefix_cache: PrefixCache | None,
    ) -> None:
        self.config = config
        self.recursion_spec = recursion_spec
        self.pool = pool
        self.prefix_cache = prefix_cache
        self.waiting: list[SequenceState] = []
        self.running: list[SequenceState] = []
        """Both in order of arrival."""
        self.step_index = 0
        self.num_preemptions = 0
        self._in_block: list[Chunk] = []  # chunks with tokens in the block
        self._exited: list[Chunk] = []  # chunks that wait for the coda
        # A token in the block at each depth, and one that waits for the coda, at the worst.
        self.num_state_slots = config.max_num_batched_tokens * (recursion_spec.max_passes + 1)
        self._free_state_slots = list(range(self.num_state_slots - 1, -1, -1))

    # -- coming and going -----------------------------------------------------------------------

    def add(self, sequence: SequenceState) -> None:
        """Queue a new sequence; it starts when there is room."""
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
        """Whether another step would do something."""
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
        """Preempt every running sequence: after a step that was interrupted halfway."""
        for sequence in list(self.running):
            self._preempt(sequence)

    def _make_room(self, sequence: SequenceState, table: PageTable, count: int) -> bool:
        """Free pages for `count` more entries; False if the sequence itself was preempted.

        Cached prefixes go first, then the youngest sequence.
        """
        missing = table.pages_needed(count)
        while missing > self.pool.num_free:
            if self.prefix_cache is not None:
                self.prefix_cache.evict(missing)
            if missing > self.pool.num_free:
                # Its chunks may be in the plan that is being built, which drops them at its end.
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    return False
        return True

    # -- coda -----------------------------------------------------------------------------------

    def schedule_coda(self) -> CodaPlan:
        """Begin a step: the chunks that go through coda and head now, and who is sampled."""
        self.step_index += 1
        chunks = self._exits_now()
        sampled = tuple(i for i, chunk in enumerate(chunks) if chunk.is_last)
        return CodaPlan(
            chunks=tuple(chunks),
            sampled_chunks=sampled,
            sampling_inputs=tuple(make_sampling_input(chunks[i].sequence) for i in sampled),
        )

    def _exits_now(self) -> list[Chunk]:
        """Chunks that have left the block, if they are to run now; per sequence by position."""
        if self.config.batching == "sequence" and self._in_block:
            return []  # the baseline waits for its deepest token
        ready: list[Chunk] = []
        # Sequences in the order of their first exit; dict.fromkeys keeps each once, in order.
        for sequence in dict.fromkeys(chunk.sequence for chunk in self._exited):
            for chunk in sequence.chunks:
                if chunk.active:
                    break  # a coda layer sees earlier tokens, whose keys must be there first
                ready.append(chunk)
        if not ready or not self._in_block:
            return ready  # nothing else can run: waiting for company would gain nothing
        waited = self.step_index - min(chunk.exited_at_step for chunk in ready)
        # Coda and head are not shared: their weights are read once per call, whether for one token
        # or for 16. Half of the running sequences is what can come together without starving.
        default = min(_EXITS_AT_ONCE, len(self.running) // 2)
        min_tokens = self.config.min_exit_tokens or default
        is_enough = sum(map(len, ready)) >= min_tokens
        return ready if is_enough or waited > self.config.max_exit_wait_steps else []

    def update_after_coda(self, plan: CodaPlan) -> None:
        """Take the plan's chunks out: they are through the model."""
        self.finish_chunks(plan.chunks)

    def finish_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Give back what chunks in flight hold, and count their tokens as computed."""
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.chunks[0] is chunk, "chunks finish in order"
            sequence.chunks.pop(0)
            self._free_state_slots.extend(chunk.state_slots)
            stop = chunk.start + len(chunk)
            sequence.recursion_counts[chunk.start : stop] = chunk.recursion_counts
            sequence.num_computed_tokens += len(chunk)
            self._extend_prefix_cache(sequence)
        done = set(map(id, chunks))
        self._exited = [chunk for chunk in self._exited if id(chunk) not in done]

    def _extend_prefix_cache(self, sequence: SequenceState) -> None:
        """Give the prefix cache each full block of `block_size` tokens that is computed now."""
        if self.prefix_cache is None or not sequence.can_extend_prefix:
            return
        size, tables = self.prefix_cache.block_size, sequence.page_tables
        node = sequence.prefix_node
        start = 0 if node is None else node.num_tokens
        while sequence.num_computed_tokens - start >= size:
            if not self.prefix_cache.contains(node):
                sequence.can_extend_prefix = False  # its prefix was evicted: nothing to hang on to
                return
            stop = start + size
            counts = sequence.recursion_counts[start:stop]
            before = node.num_kv_entries if node is not None else (0,) * len(tables)
            added = sequence.count_kv_entries(counts)
            node = self.prefix_cache.insert(
                parent=node,
                namespace=sequence.prefix_namespace,
                tokens=sequence.token_ids[start:stop],
                counts=counts,
                entries=[old + new for old, new in zip(before, added, strict=True)],
                tables=tables,
            )
            if node.recursion_counts != tuple(counts):
                # Somebody else computed these tokens in another batch, where rounding moved a
                # router's decision: its entries are not ours, so what follows is not either.
                sequence.can_extend_prefix = False
                return
            sequence.prefix_node = node
            start = stop

    def take_all_chunks(self) -> None:
        """Take all chunks out of both queues; `requeue` puts each one back (multi-step)."""
        self._in_block.clear()
        self._exited.clear()

    # -- prelude --------------------------------------------------------------------------------

    def schedule_prelude(self) -> PreludePlan:
        """Tokens that enter now: generated ones first, then prompts, then new sequences."""
        if self.config.batching == "sequence" and (self._in_block or self._exited):
            return PreludePlan()  # the baseline starts a batch when the one before is through
        in_block = sum(len(chunk.active) for chunk in self._in_block)
        budget = self.config.max_num_batched_tokens - in_block
        budget = min(budget, len(self._free_state_slots))
        chunks: list[Chunk] = []
        page_copies: list[tuple[int, int]] = []
        pending = [s for s in self.running if s.num_unscheduled_tokens]
        # One token left is a decode: it goes first. The sort is stable: by arrival within each.
        pending.sort(key=lambda s: s.num_unscheduled_tokens > 1)
        for sequence in pending:
            if budget > 0 and sequence.is_running:  # not preempted for another one meanwhile
                chunk = self.schedule_chunk(sequence, budget)
                if chunk is not None:
                    chunks.append(chunk)
                    budget -= len(chunk)
        while budget > 0 and (admitted := self._admit()) is not None:
            page_copies += self._reuse_prefix(admitted)
            chunk = self.schedule_chunk(admitted, budget)
            if chunk is not None:
                chunks.append(chunk)
                budget -= len(chunk)
        # A later chunk may have preempted the sequence of an earlier one.
        kept = tuple(chunk for chunk in chunks if chunk in chunk.sequence.chunks)
        return PreludePlan(chunks=kept, page_copies=tuple(page_copies))

    def schedule_chunk(self, sequence: SequenceState, budget: int) -> Chunk | None:
        """A chunk of the sequence's next tokens, `budget` at most; None if it was preempted."""
        count = min(sequence.num_unscheduled_tokens, self.config.chunked_prefill_size, budget)
        if sequence.unshared_table is not None:
            if not self._make_room(sequence, sequence.unshared_table, count):
                return None
            sequence.unshared_table.append(count)
        # There are enough: `budget` is at most the number of free ones.
        slots = self._free_state_slots[-count:]
        del self._free_state_slots[-count:]
        chunk = Chunk(sequence=sequence, start=sequence.num_scheduled_tokens, state_slots=slots)
        sequence.num_scheduled_tokens += count
        sequence.chunks.append(chunk)
        return chunk

    def _admit(self) -> SequenceState | None:
        """Move the first waiting sequence to the running ones, if there is room for it."""
        if not self.waiting or len(self.running) >= self.config.max_num_seqs:
            return None
        sequence = self.waiting[0]
        if self.running:  # alone it always fits: `LLM.add_request` has seen to that
            # Each running sequence may need one more page soon: do not take that from it.
            wanted = self._estimate_pages(sequence) + len(self.running)
            if self.prefix_cache is not None:
                self.prefix_cache.evict(wanted)
            if self.pool.num_free < wanted:
                return None
        self.waiting.pop(0)
        sequence.is_running = True
        insort(self.running, sequence, key=lambda s: s.arrival_index)
        return sequence

    def _estimate_pages(self, sequence: SequenceState) -> int:
        """Pages that the known tokens will probably take, and one more at every depth."""
        count = len(sequence.token_ids)
        unshared = (
            sequence.unshared_table.layout.pages_for(count + 1)
            if sequence.unshared_table is not None
            else 0
        )
        # Not strict: where all depths share a table it is the only one, and holds every token.
        shares = zip(sequence.depth_tables, self.recursion_spec.depth_fractions, strict=False)
        return unshared + sum(t.layout.pages_for(int(count * share) + 1) for t, share in shares)

    def _reuse_prefix(self, sequence: SequenceState) -> list[tuple[int, int]]:
        """Let a sequence start after its longest cached prefix; the (from, to) pages to copy."""
        if self.prefix_cache is None:
            return []
        nodes = self.prefix_cache.match_prefix(sequence.prefix_namespace, sequence.token_ids)
        if sequence.params.prompt_logprobs:
            # Their log-probabilities need the hidden states from the token before the first on.
            last = sequence.params.prompt_logprobs_from - 1
            nodes = [node for node in nodes if node.num_tokens <= last]
        # Each table may need a copy of its prefix's last page.
        if not nodes or self.pool.num_free < len(sequence.page_tables):
            return []
        page_copies = self.prefix_cache.attach(nodes, sequence.page_tables)
        sequence.prefix_node = nodes[-1]
        known = nodes[-1].num_tokens
        counts = [count for node in nodes for count in node.recursion_counts]
        sequence.recursion_counts[:known] = counts
        sequence.num_scheduled_tokens = sequence.num_computed_tokens = known
        # After a preemption its own output may be cached, too; only the prompt counts.
        sequence.num_cached_tokens = min(known, sequence.num_prompt_tokens)
        return page_copies

    def update_after_prelude(self, plan: PreludePlan, output: PreludeOutput) -> None:
        """Put the plan's chunks into the block, or among the exits if no token goes on."""
        at = 0  # index into the plan's tokens
        for chunk in plan.chunks:
            count = len(chunk)
            chunk.recursion_counts = [0] * count
            is_forced = chunk.sequence.min_recursions > 0
            flags = output.goes_on[at : at + count]
            chunk.active = [i for i, goes_on in enumerate(flags) if goes_on or is_forced]
            at += count
            self.requeue(chunk)

    def requeue(self, chunk: Chunk) -> None:
        """Put a chunk among those in the block, or among those that wait for the coda."""
        if chunk.active:
            self._in_block.append(chunk)
        else:
            chunk.exited_at_step = self.step_index
            self._exited.append(chunk)

    # -- block ----------------------------------------------------------------------------------

    def schedule_block(self) -> BlockPlan:
        """Every active token in the block, each with an entry for its keys and values."""
        writing: list[tuple[Chunk, int]] = []  # with the index of the first entry
        reading: list[Chunk] = []
        # Oldest first, so that when pages run out it is the youngest that is preempted.
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
        # A sequence may have been preempted after its own turn. Both sorts by depth are stable.
        writing = [(c, first) for c, first in writing if c in c.sequence.chunks]
        writing.sort(key=lambda pair: pair[0].depth)
        reading = sorted((c for c in reading if c in c.sequence.chunks), key=lambda c: c.depth)
        return BlockPlan(
            chunks=(*(chunk for chunk, _ in writing), *reading),
            first_kv_entries=(*(first for _, first in writing), *(0 for _ in reading)),
            num_writing_chunks=len(writing),
        )

    def update_after_block(self, plan: BlockPlan, output: BlockOutput) -> None:
        """Move the plan's chunks one depth on; tokens that stop leave their chunk's run."""
        spec = self.recursion_spec
        at = 0  # index into the plan's tokens
        for chunk in plan.chunks:
            chunk.depth += 1
            depth, sequence = chunk.depth, chunk.sequence
            flags = output.goes_on[at : at + len(chunk.active)]
            at += len(chunk.active)
            for i in chunk.active:
                chunk.recursion_counts[i] += spec.recursions_per_pass
            if depth >= spec.max_passes or depth >= sequence.max_recursions:
                chunk.active = []
            elif depth >= sequence.min_recursions:  # below it the router is not asked
                chunk.active = [i for i, on in zip(chunk.active, flags, strict=True) if on]
        # The plan had all chunks that are in the block now.
        passed = self._in_block
        self._in_block = []
        for chunk in passed:
            self.requeue(chunk)

    # -- invariants -----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert that every page and every state slot is held by exactly those who know of it."""
        held = [p for s in self.running for table in s.page_tables for p in table.pages]
        if self.prefix_cache is not None:
            held += self.prefix_cache.cached_pages()
        self.pool.check_integrity(held)
        slots = [slot for s in self.running for chunk in s.chunks for slot in chunk.state_slots]
        slots += self._free_state_slots
        assert sorted(slots) == list(range(self.num_state_slots)), "state slots leaked"
        in_flight = {id(c) for s in self.running for c in s.chunks}
        assert in_flight == set(map(id, self._in_block + self._exited)), "chunks leaked"
        assert all(not t.pages for s in self.waiting for t in s.page_tables), "waiting with pages"
        for sequence in self.running:
            in_flight_tokens = sum(map(len, sequence.chunks))
            assert sequence.num_scheduled_tokens == sequence.num_computed_tokens + in_flight_tokens
