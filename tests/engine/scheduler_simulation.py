"""The scheduler without a model: routers that throw dice, tokens that are numbers."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from mor.engine.config import EngineConfig
from mor.engine.pages import PageLayout, PagePool, PageTable
from mor.engine.plan import BlockOutput, PreludeOutput, PreludePlan
from mor.engine.prefix import PrefixCache
from mor.engine.request import Chunk, SequenceState
from mor.engine.scheduler import Scheduler
from mor.model.sampling import SamplingParams
from mor.model.sharing import RecursionSpec

Router = Callable[[SequenceState, int, int], bool]
"""(sequence, position, depth) -> whether the token goes on to that depth."""


def by_token(sequence: SequenceState, position: int, depth: int) -> bool:
    """Depends on nothing but the tokens so far, as real routers do."""
    return hash((*sequence.token_ids[: position + 1], depth)) % 10 < 6


def always(sequence: SequenceState, position: int, depth: int) -> bool:
    """Every token takes every pass."""
    return True


def after_the_first(sequence: SequenceState, position: int, depth: int) -> bool:
    """Everybody takes the first pass, as models do that share keys and values."""
    return depth == 0 or by_token(sequence, position, depth)


class Ran(NamedTuple):
    """A run of tokens in one pass of the block."""

    order: int
    """Of its sequence."""
    start: int
    """Position of its chunk."""
    depth: int
    tokens: int
    writes: bool
    first_entry: int


class Simulation:
    """A scheduler, driven step by step; keeps what happened in each."""

    def __init__(
        self,
        *,
        pages: int = 10_000,
        recursions: int = 3,
        shared_kv: bool = False,
        router: Router = by_token,
        **fields: Any,
    ) -> None:
        config = EngineConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 32, **fields})
        self.recursions, self.router = recursions, router
        self.pool = PagePool(pages)
        self.prefix_cache = (
            PrefixCache(self.pool, config.block_size) if config.enable_prefix_caching else None
        )
        share = 1.0 if router is always else 0.6
        depth_fractions = tuple(share**depth for depth in range(recursions))
        self.passes = RecursionSpec(
            max_passes=recursions,
            recursions_per_pass=1,
            shared_kv=shared_kv,
            depth_fractions=depth_fractions,
        )
        self.scheduler = Scheduler(config, self.passes, self.pool, self.prefix_cache)
        self.layout = PageLayout(block_size=config.block_size, layers=1, layers_per_page=1)
        self.sequences: list[SequenceState] = []
        self.finishes: list[tuple[Chunk, ...]] = []
        self.others: list[int] = []
        """Chunks in the block at the beginning of each step."""
        self.enters: list[PreludePlan] = []
        self.advances: list[list[Ran]] = []
        self.came: dict[int, list[int]] = {}
        """By order of arrival: steps in which tokens came."""

    def add(self, prompt: list[int], max_tokens: int, **fields: Any) -> SequenceState:
        """A new request."""
        tables = 1 if self.passes.shared_kv else self.recursions
        order = len(self.sequences)
        sequence = SequenceState(
            request_id=str(order),
            index=0,
            arrival_index=order,
            params=SamplingParams(max_tokens=max_tokens),
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            **{"min_recursions": 0, "max_recursions": self.recursions, **fields},
            stop_token_ids=frozenset(),
            rng=random.Random(order),
            unshared_table=PageTable(self.layout, self.pool),
            depth_tables=[PageTable(self.layout, self.pool) for _ in range(tables)],
        )
        self.sequences.append(sequence)
        self.came[order] = []
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        """What `LLM.step` does, without computing anything."""
        scheduler = self.scheduler
        self.others.append(len(scheduler._in_block))
        coda = scheduler.schedule_coda()
        self.finishes.append(coda.chunks)
        scheduler.update_after_coda(coda)
        assert [coda.chunks[i].is_last for i in coda.sampled_chunks] == [True] * len(
            coda.sampling_inputs
        )
        for index in coda.sampled_chunks:
            sequence = coda.chunks[index].sequence
            sequence.token_ids.append(len(sequence.token_ids) % 5)
            self.came[sequence.arrival_index].append(scheduler.step_index)
            if sequence.num_output_tokens == sequence.params.max_tokens:
                scheduler.remove(sequence)
        prelude = scheduler.schedule_prelude()
        self.enters.append(prelude)
        enters = [(c, i) for c in prelude.chunks for i in range(len(c))]
        goes_on = tuple(self.router(c.sequence, c.start + i, 0) for c, i in enters)
        scheduler.update_after_prelude(prelude, PreludeOutput(goes_on=goes_on))
        block = scheduler.schedule_block()
        writing = block.num_writing_chunks
        runs = enumerate(zip(block.chunks, block.first_kv_entries, strict=True))
        self.advances.append(
            [
                Ran(c.sequence.arrival_index, c.start, c.depth, len(c.active), i < writing, e)
                for i, (c, e) in runs
            ]
        )
        present = [(c, i) for c in block.chunks for i in c.active]
        goes_on = tuple(self.router(c.sequence, c.start + i, c.depth + 1) for c, i in present)
        scheduler.update_after_block(block, BlockOutput(goes_on=goes_on))
        self.check()

    def run(self, maximum: int = 5000) -> int:
        """Step until everything is done; how often."""
        for number in range(maximum):
            if not self.scheduler.has_unfinished:
                return number
            self.step()
        raise AssertionError("the scheduler makes no progress")

    def check(self) -> None:
        """Pages and state slots are in order, limits are kept, entries are what counts say."""
        scheduler, config = self.scheduler, self.scheduler.config
        scheduler.check_integrity()
        assert len(scheduler.running) <= config.max_num_seqs
        assert all(len(c) <= config.chunked_prefill_size for c in self.enters[-1].chunks)
        assert sum(run.tokens for run in self.advances[-1]) <= config.max_num_batched_tokens
        for queue in (scheduler.running, scheduler.waiting):
            orders = [sequence.arrival_index for sequence in queue]
            assert orders == sorted(orders)
        for sequence in scheduler.running:
            counts = sequence.recursion_counts[: sequence.num_computed_tokens]
            counts = counts + [
                count for chunk in sequence.chunks for count in chunk.recursion_counts
            ]
            assert sequence.unshared_table is not None
            assert (
                sequence.unshared_table.num_entries == sequence.num_scheduled_tokens == len(counts)
            )
            for depth, table in enumerate(sequence.depth_tables):
                assert table.num_entries == sum(count > depth for count in counts)
