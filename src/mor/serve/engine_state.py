"""`EngineState`: how many requests run, and the KV pages held at each depth, at one moment."""

from dataclasses import dataclass

from mor.engine.llm import LLM
from mor.engine.pages import PageTable


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """Numbers of the engine between two steps; read in its thread.

    A page that several sequences share counts once.
    """

    running: int
    """Sequences in flight."""
    waiting: int
    """Sequences that have not started, or were preempted."""
    tokens_by_depth: list[int]
    """(R + 1,) tokens generated so far by their recursion count, from 0 to R."""
    pages_by_depth: list[int]
    """(R,) pages that running sequences hold at each depth; only the first where depths share."""
    pages_unshared: int
    """Pages that running sequences hold for prelude and coda."""
    pages_cached: int
    """Pages that only the prefix cache holds."""
    pages_used: int
    """Pages that are not free."""
    pages_total: int
    page_bytes: int
    """Bytes of one page, keys and values together."""
    preemptions: int
    """Sequences that were preempted so far."""

    @classmethod
    def of(cls, llm: LLM) -> "EngineState":
        """The state of an engine, now."""
        running = llm.scheduler.running
        held = {page for s in running for table in s.page_tables for page in table.pages}
        cached = (
            set(llm.prefix_cache.cached_pages()) if llm.prefix_cache is not None else set[int]()
        )
        depths: list[list[PageTable]] = [[] for _ in range(llm.model_config.num_recursions)]
        for sequence in running:
            # A sequence has one table where all depths share their KV entries, otherwise R.
            for tables, table in zip(depths, sequence.depth_tables, strict=False):
                tables.append(table)
        return cls(
            running=len(running),
            waiting=len(llm.scheduler.waiting),
            tokens_by_depth=list(llm.stats.depth_histogram),
            pages_by_depth=[_distinct(tables) for tables in depths],
            pages_unshared=_distinct(
                [s.unshared_table for s in running if s.unshared_table is not None]
            ),
            pages_cached=len(cached - held),
            pages_used=llm.pool.num_pages - llm.pool.num_free,
            pages_total=llm.pool.num_pages,
            page_bytes=llm.cache.page_bytes,
            preemptions=llm.scheduler.num_preemptions,
        )


def _distinct(tables: list[PageTable]) -> int:
    """How many different pages these tables hold."""
    return len({page for table in tables for page in table.pages})
