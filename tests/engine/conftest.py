"""Memory that nobody has written is NaN in all engine tests, so that a read of it shows."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from mor import LLM


def poison(llm: LLM) -> None:
    """Fill the KV pages and state slots of a new engine with NaN, and pages again when freed.

    A freed page is filled just before anything is computed with the plan that may reallocate it,
    and after the plan's page copies: a page that a copy is taken from may be free already.
    """
    cache, pool, height = llm.cache, llm.pool, llm.cache.layers_per_page
    for memory in (cache.kv.k, cache.kv.v, *_float_buffers(llm.runner.states)):
        memory.fill_(math.nan)
    freed = set[int]()
    decref, copy_pages, run_block = pool.decref, cache.copy_pages, llm.runner.run_block

    def decref_and_note(page: int) -> None:
        decref(page)
        if pool._ref_counts[page] == 0:
            freed.add(page)

    def fill_freed(copied: Sequence[int] = ()) -> None:
        for page in freed.difference(copied):
            for memory in (cache.kv.k, cache.kv.v):
                memory[page * height : (page + 1) * height].fill_(math.nan)
        freed.clear()

    def copy_and_fill(pairs: Sequence[tuple[int, int]]) -> None:
        copy_pages(pairs)
        fill_freed([target for _, target in pairs])

    def fill_and_run_block(plan: Any) -> Any:
        fill_freed()
        return run_block(plan)

    pool.decref = decref_and_note  # type: ignore[method-assign]
    cache.copy_pages = copy_and_fill  # type: ignore[method-assign]
    llm.runner.run_block = fill_and_run_block  # type: ignore[method-assign]
    if llm.multi_step is not None:
        decoder = llm.multi_step._decoder
        decode = decoder.run

        def fill_and_decode(plan: Any) -> Any:
            fill_freed()
            return decode(plan)

        decoder.run = fill_and_decode  # type: ignore[method-assign]


def _float_buffers(states: object) -> list[Tensor]:
    """The buffers of `HiddenStates` that hold a row for each state slot."""
    num_slots = len(states.hidden)  # type: ignore[attr-defined]
    tensors = [value for value in vars(states).values() if isinstance(value, Tensor)]
    return [t for t in tensors if t.is_floating_point() and t.ndim and len(t) == num_slots]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    build = LLM.__init__

    def build_and_poison(llm: LLM, *args: Any, **kwargs: Any) -> None:
        build(llm, *args, **kwargs)
        poison(llm)

    monkeypatch.setattr(LLM, "__init__", build_and_poison)
