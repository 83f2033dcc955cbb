"""Multi-step scheduling: several decode steps in a row on the device, without the host in between.

Before the run the host reserves pages for whatever may happen in it; afterwards it learns what did
happen, and brings its bookkeeping up to date. vLLM calls this multi-step scheduling.

Invariants:

- A run begins only when every running sequence has exactly one token in flight, its last one, and
  nobody could be admitted.
- Pages: before a run each table has pages for all entries that the run can add; afterwards those
  that hold no entry are released. Nothing is preempted in a run.
- The device has the truth during a run: the chunks are out of the scheduler's queues until then.
- Afterwards the scheduler's state is what the same steps one by one would have left, had no token
  waited for others before the coda.
- What was computed for a sequence after the token that ended it is forgotten.

Plain Python: no tensors here.
"""

from collections.abc import Generator

from mor.engine.multistep.device_decoder import DeviceDecoder
from mor.engine.pages import PageTable
from mor.engine.plan import DecodePlan
from mor.engine.request import Chunk, SequenceState
from mor.engine.sampler import DeviceSampler
from mor.engine.scheduler import Scheduler
from mor.engine.stats import EngineStats


class MultiStepScheduler:
    """Plans runs of up to `num_steps` decode steps, when there is nothing else to do."""

    def __init__(
        self, scheduler: Scheduler, decoder: DeviceDecoder, stats: EngineStats, num_steps: int
    ) -> None:
        self._scheduler = scheduler
        self._decoder = decoder
        self._stats = stats
        self._num_steps = num_steps

    def schedule(self) -> DecodePlan | None:
        """A run over the tokens in flight of all running sequences, with its pages reserved.

        None if a single step must do: a prompt is under way, somebody could be admitted, a sequence
        needs the host at every token, or pages are short.
        """
        scheduler = self._scheduler
        running = scheduler.running
        if scheduler.waiting and len(running) < scheduler.config.max_num_seqs:
            return None
        # One token in flight, and it is the last one that is known.
        if not all(
            len(s.token_ids) == s.num_computed_tokens + 1 == s.num_scheduled_tokens for s in running
        ):
            return None
        if not all(map(DeviceSampler.supports, running)):
            return None
        wanted = [pair for s in running for pair in _max_new_entries(s, self._num_steps)]
        missing = sum(table.pages_needed(count) for table, count in wanted)
        if scheduler.prefix_cache is not None:
            scheduler.prefix_cache.evict(missing)
        if missing > scheduler.pool.num_free:
            return None
        for table, count in wanted:
            table.reserve(count)
        # A token takes at most one step for each pass and one in which it exits and is replaced:
        # after so many steps all sequences have reached their `max_tokens`.
        max_steps = (scheduler.recursion_spec.max_passes + 1) * max(
            (s.num_remaining for s in running), default=0
        )
        return DecodePlan(
            chunks=tuple(s.chunks[0] for s in running), num_steps=min(self._num_steps, max_steps)
        )

    def run(self, plan: DecodePlan) -> Generator[tuple[SequenceState, int, float]]:
        """Run a plan; (sequence, token id, log-probability) of each sampled token, step by step.

        The caller appends the token to the sequence before it asks for the next one, and may end
        the sequence with it.
        """
        scheduler = self._scheduler
        sequences = [chunk.sequence for chunk in plan.chunks]
        scheduler.take_all_chunks()
        output = self._decoder.run(plan)
        for tokens in output.steps:
            scheduler.step_index += 1
            for sequence, token in zip(sequences, tokens, strict=True):
                if token is None or sequence.finish_reason is not None:
                    continue
                # As a step does: the token in flight is computed, the sampled one is appended (by
                # the caller), and enters in its place.
                self._finish_chunk(sequence, token.num_passes)
                yield sequence, token.token_id, token.logprob
                if sequence.finish_reason is None:
                    scheduler.schedule_chunk(sequence, 1)
        self._stats.steps += len(output.steps) - 1  # the engine step itself counts as one
        # Tokens that are in flight at the end go on where the device has left them.
        for sequence, active, depth in zip(sequences, output.active, output.depths, strict=True):
            if sequence.finish_reason is None:
                chunk = self._record_passes(sequence, depth)
                chunk.active = [0] if active else []
                scheduler.requeue(chunk)
                for table in sequence.page_tables:
                    table.release_unused()

    def _finish_chunk(self, sequence: SequenceState, num_passes: int) -> None:
        """Count a sequence's token in flight as computed, after so many passes."""
        chunk = self._record_passes(sequence, num_passes)
        chunk.active = []
        self._scheduler.finish_chunks([chunk])

    def _record_passes(self, sequence: SequenceState, num_passes: int) -> Chunk:
        """Bring the chunk of a sequence's token in flight, and its tables, up to its last pass."""
        (chunk,) = sequence.chunks
        for depth in range(chunk.depth, num_passes):
            self._stats.block_tokens += 1
            if depth < len(sequence.depth_tables):  # else all depths share the first one's entries
                sequence.depth_tables[depth].append(1)
        chunk.depth = num_passes
        chunk.recursion_counts = [num_passes * self._scheduler.recursion_spec.recursions_per_pass]
        return chunk


def _max_new_entries(sequence: SequenceState, num_steps: int) -> list[tuple[PageTable, int]]:
    """Each of a sequence's tables, with the entries that so many steps can add to it at most.

    A step adds at most one entry to a table. The token in flight and its successors pass the block;
    only the successors enter prelude and coda, where the token in flight has its entry already. The
    last token that `max_tokens` allows is sampled, but enters neither.
    """
    remaining = sequence.num_remaining
    entries = [(table, min(num_steps, remaining)) for table in sequence.depth_tables]
    if sequence.unshared_table is not None:
        entries.insert(0, (sequence.unshared_table, min(num_steps, remaining - 1)))
    return entries
