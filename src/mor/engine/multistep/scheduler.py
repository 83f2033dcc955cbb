"""Bursts: decode ticks that a device runs in a row, planned before and told afterwards.

No tensors here. The scheduler's state afterwards is what the same ticks one by one, without
gathering exits, would have left.
"""

from collections.abc import Generator

from mor.engine.multistep.device_decoder import Flight
from mor.engine.pages import PageTable
from mor.engine.request import Chunk, Sequence
from mor.engine.sampler import SteadySampler
from mor.engine.scheduler import EnterPlan, Scheduler
from mor.engine.stats import EngineStats


class Burst:
    """Runs `ticks` decode ticks at a time, when there is nothing else to do."""

    def __init__(
        self, scheduler: Scheduler, flight: Flight, stats: EngineStats, ticks: int
    ) -> None:
        self._scheduler, self._flight, self._stats, self._ticks = scheduler, flight, stats, ticks

    def plan(self) -> list[Chunk]:
        """The token in flight of every running sequence, with pages reserved for what may come.

        Empty if a prompt is under way, somebody could be admitted, a sequence wants what needs the
        host at every token, or pages are short: then one tick must do.
        """
        scheduler = self._scheduler
        running = scheduler.running
        if scheduler.waiting and len(running) < scheduler.config.max_sequences:
            return []
        if not all(len(s.tokens) == s.num_finished + 1 == s.num_entered for s in running):
            return []
        if not all(map(SteadySampler.takes, running)):
            return []
        wanted = [(table, n) for s in running for table, n in _entries(s, self._ticks)]
        missing = sum(table.missing(n) for table, n in wanted)
        if scheduler.prefixes is not None:
            scheduler.prefixes.evict(missing)
        if missing > scheduler.pool.num_free:
            return []
        for table, n in wanted:
            table.reserve(n)
        return [s.chunks[0] for s in running]

    def run(self, chunks: list[Chunk]) -> Generator[tuple[Sequence, int, float]]:
        """The tokens that come, with their log-probabilities: (sequence, token, log-probability).

        Whoever hears of one may end its sequence; what came after it is then forgotten.
        """
        sequences = [chunk.sequence for chunk in chunks]
        self._scheduler.lift()
        longest = max(s.num_remaining for s in sequences) * (self._scheduler.passes.most + 1)
        landed = self._flight.run(chunks, min(self._ticks, longest))
        for lines in landed.log:
            self._scheduler.tick += 1
            for sequence, (sampled, token, logprob, passes) in zip(sequences, lines, strict=True):
                if sampled and sequence.finish_reason is None:
                    self._through(sequence, int(passes))
                    yield sequence, int(token), logprob
                    if sequence.finish_reason is None:
                        self._scheduler.enter(sequence, 1, EnterPlan())
        self._stats.ticks += len(landed.log) - 1  # the step itself counts as one
        for sequence, present, depth in zip(sequences, landed.present, landed.depth, strict=True):
            if sequence.finish_reason is None:
                chunk = self._passed(sequence, depth)
                chunk.present = [0] if present else []
                self._scheduler.place(chunk)
                for table in sequence.tables:
                    table.trim()

    def _through(self, sequence: Sequence, passes: int) -> None:
        """Its token in flight is through the model."""
        chunk = self._passed(sequence, passes)
        chunk.present = []
        self._scheduler.finished([chunk])

    def _passed(self, sequence: Sequence, passes: int) -> Chunk:
        """Note that its token in flight has so many passes behind it."""
        (chunk,) = sequence.chunks
        for depth in range(chunk.depth, passes):
            self._stats.lanes += 1
            if depth < len(sequence.depths):  # else all depths share the first one's entries
                sequence.depths[depth].append(1)
        chunk.depth = passes
        chunk.counts = [passes * self._scheduler.passes.recursions]
        return chunk


def _entries(sequence: Sequence, ticks: int) -> list[tuple[PageTable, int]]:
    """Its tables, and the entries that each may get at most.

    The token in flight and its successors pass the block; only the successors enter prelude and
    coda, and the last token that is sampled does neither.
    """
    left = sequence.num_remaining
    outer = [] if sequence.outer is None else [(sequence.outer, min(ticks, left - 1))]
    return [*outer, *((table, min(ticks, left)) for table in sequence.depths)]
