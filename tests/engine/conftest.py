"""Memory that nobody has written is NaN in all engine tests, so that a read of it shows."""

import math
from typing import Any

import pytest
from torch import Tensor

from mor import LLM


def poison(llm: LLM) -> None:
    """Fill what the engine has not written yet with NaN: all KV pages, all state slots."""
    cache = llm.cache
    for memory in (cache.kv.k, cache.kv.v, *_floats(llm.runner.states)):
        memory.fill_(math.nan)
    decref, height = llm.pool.decref, cache.layers_per_page

    def decref_and_poison(page: int) -> None:
        decref(page)
        if llm.pool._ref_counts[page] == 0:  # whoever gets it next has to write it first
            for memory in (cache.kv.k, cache.kv.v):
                memory[page * height : (page + 1) * height].fill_(math.nan)

    llm.pool.decref = decref_and_poison  # type: ignore[method-assign]


def _floats(states: object) -> list[Tensor]:
    """The buffers of `HiddenStates` that hold a row for each state slot."""
    slots = len(states.hidden)  # type: ignore[attr-defined]
    tensors = [value for value in vars(states).values() if isinstance(value, Tensor)]
    return [t for t in tensors if t.is_floating_point() and t.ndim and len(t) == slots]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    build = LLM.__init__

    def built_and_poisoned(llm: LLM, *args: Any, **kwargs: Any) -> None:
        build(llm, *args, **kwargs)
        poison(llm)

    monkeypatch.setattr(LLM, "__init__", built_and_poisoned)
