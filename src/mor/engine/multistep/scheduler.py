"""Bursts: decode ticks that a device runs in a row, planned before and told afterwards.

No tensors here. The scheduler's state afterwards is what the same ticks one by one, without
gathering exits, would have left.
"""

from collections.abc import Generator

from mor.engine.multistep.device_decoder import DeviceDecoder
from mor.engine.pages import PageTable
from mor.engine.request import Chunk, SequenceState
from mor.engine.sampler import DeviceSampler
from mor.engine.scheduler import Scheduler
from mor.engine.stats import EngineStats


class MultiStepScheduler:
    """Runs `ticks` decode ticks at a time, when there is nothing else to do."""

    def __init__(
        self, scheduler: Scheduler, flight: DeviceDecoder, stats: EngineStats, steps: int
    ) -> None:
        self._scheduler, self._decoder, self._stats, self._num_steps = (
            scheduler,
            flight,
            stats,
            steps,
        )

    def schedule(self) -> list[Chunk]:
        """The token in flight of every running sequence, with pages reserved for what may come.

        Empty if a prompt is under way, somebody could be admitted, a sequence wants what needs the
        host at every token, or pages are short: then one tick must do.
        """
        scheduler = self._scheduler
        running = scheduler.running
        if scheduler.waiting and len(running) < scheduler.config.max_num_seqs:
            return []
        if not all(
            len(s.token_ids) == s.num_computed_tokens + 1 == s.num_scheduled_tokens for s in running
        ):
            return []
        if not all(map(DeviceSampler.supports, running)):
            return []
        wanted = [(table, n) for s in running for table, n in _entries(s, self._num_steps)]
        missing = sum(table.pages_needed(n) for table, n in wanted)
        if scheduler.prefix_cache is not None:
            scheduler.prefix_cache.evict(missing)
        if missing > scheduler.pool.num_free:
            return []
        for table, n in wanted:
            table.reserve(n)
        return [s.chunks[0] for s in running]

    def run(self, chunks: list[Chunk]) -> Generator[tuple[SequenceState, int, float]]:
        """The tokens that come, with their log-probabilities: (sequence, token, log-probability).

        Whoever hears of one may end its sequence; what came after it is then forgotten.
        """
        sequences = [chunk.sequence for chunk in chunks]
        self._scheduler.take_all_chunks()
        max_length = max(s.num_remaining for s in sequences) * (
            self._scheduler.recursion_spec.max_passes + 1
        )
        landed = self._decoder.run(chunks, min(self._num_steps, max_length))
        for lines in landed.log:
            self._scheduler.step_index += 1
            for sequence, (sampled, token, logprob, passes) in zip(sequences, lines, strict=True):
                if sampled and sequence.finish_reason is None:
                    self._exit(sequence, int(passes))
                    yield sequence, int(token), logprob
                    if sequence.finish_reason is None:
                        self._scheduler.schedule_chunk(sequence, 1)
        self._stats.steps += len(landed.log) - 1  # the step itself counts as one
        for sequence, present, depth in zip(sequences, landed.active, landed.depth, strict=True):
            if sequence.finish_reason is None:
                chunk = self._record_passes(sequence, depth)
                chunk.active = [0] if present else []
                self._scheduler.requeue(chunk)
                for table in sequence.page_tables:
                    table.release_unused()

    def _exit(self, sequence: SequenceState, passes: int) -> None:
        """Its token in flight is through the model."""
        chunk = self._record_passes(sequence, passes)
        chunk.active = []
        self._scheduler.finish_chunks([chunk])

    def _record_passes(self, sequence: SequenceState, passes: int) -> Chunk:
        """Note that its token in flight has so many passes behind it."""
        (chunk,) = sequence.chunks
        for depth in range(chunk.depth, passes):
            self._stats.block_tokens += 1
            if depth < len(sequence.depth_tables):  # else all depths share the first one's entries
                sequence.depth_tables[depth].append(1)
        chunk.depth = passes
        chunk.recursion_counts = [passes * self._scheduler.recursion_spec.recursions_per_pass]
        return chunk


def _entries(sequence: SequenceState, steps: int) -> list[tuple[PageTable, int]]:
    """Its tables, and the entries that each may get at most.

    The token in flight and its successors pass the block; only the successors enter prelude and
    coda, and the last token that is sampled does neither.
    """
    left = sequence.num_remaining
    unshared = (
        [] if sequence.unshared_table is None else [(sequence.unshared_table, min(steps, left - 1))]
    )
    return [*unshared, *((table, min(steps, left)) for table in sequence.depth_tables)]
