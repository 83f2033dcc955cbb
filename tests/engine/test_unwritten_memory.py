"""The NaN in memory that nobody has written (`conftest.py`) does show when something reads it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine_helpers import engine_of
from mor.engine.llm import LLM
from mor.model.sampling import SamplingParams
from mor.ops import reference
from mor.ops.paged import AttentionMetadata
from tiny import tiny_model

PARAMS = SamplingParams(max_tokens=4, prompt_logprobs=True)


def has_nan(llm: LLM) -> bool:
    """Whether NaN reached a log-probability."""
    (done,) = llm.generate([[1, 2, 3, 4, 5]], PARAMS)
    return any(map(math.isnan, [*done.prompt_logprobs[1:], *done.logprobs]))


def test_a_new_engine_holds_nothing_but_nan() -> None:
    llm = engine_of()
    for memory in (llm.cache.kv.k, llm.cache.kv.v, llm.runner.states.hidden):
        assert memory.isnan().all()
    assert not has_nan(llm)


def test_freed_pages_are_nan_before_they_are_used_again() -> None:
    llm = engine_of(enable_prefix_caching=False)
    assert not has_nan(llm)
    assert not llm.cache.kv.v.isnan().all()
    llm.runner.cache.copy_pages([])  # as at the beginning of a step
    assert llm.cache.kv.v.isnan().all()


def test_an_entry_too_many_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = reference.attend

    def attend_to_one_more(q: Any, kv: Any, layer: int, metadata: AttentionMetadata) -> Any:
        longer = replace(metadata, context_lens=metadata.context_lens + 1)
        return attend(q, kv, layer, longer)

    monkeypatch.setattr(reference, "attend", attend_to_one_more)
    assert has_nan(engine_of(block_size=16))


def test_an_entry_that_is_not_stored_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "store", lambda *_: None)
    assert has_nan(engine_of())


def test_a_state_that_is_not_written_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine_of()
    states = llm.runner.states
    read, unused = states.read, len(states.hidden) - 1
    monkeypatch.setattr(states, "read", lambda slots: read([unused] * len(slots)))
    assert has_nan(llm)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 31, 33, 129])
def test_compiled_attention_reads_only_what_is_written(block_size: int, num_tokens: int) -> None:
    """Its panels of 16 entries end where a sequence does, whatever follows there in the cell."""
    wide = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    model = tiny_model("recursive", **wide, max_position_embeddings=144).float()
    prompt = torch.randint(0, 61, (num_tokens,), generator=torch.Generator().manual_seed(0))
    found = []
    for kernels in ("cpu", "reference"):
        llm = engine_of(model=model, kernels=kernels, block_size=block_size)
        (done,) = llm.generate([prompt.tolist()], PARAMS)
        found.append([*done.prompt_logprobs[1:], *done.logprobs])
    assert found[0] == pytest.approx(found[1], abs=1e-4)
