"""What the engine's tests share: tight memory, drawn settings and requests, comparisons."""

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

from hypothesis import strategies as st

from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.engine.request import TokenOutput
from mor.model.generation import generate
from mor.model.sampling import Completion, SamplingParams
from mor.model.transformer import MoRModel
from tiny import tiny_model

VOCAB = 61
EOS = 7
MAX_STEPS = 3000

shared_model = cache(tiny_model)
"""A tiny model, built once; tests must not change it."""


def engine_of(kind: str = "expert", *, model: MoRModel | None = None, **fields: Any) -> LLM:
    """An engine of a tiny model, or of one that is given, with little room."""
    defaults = {
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "kv_cache_memory_bytes": 2**20,
    }
    return LLM(model or shared_model(kind), EngineConfig(**{**defaults, **fields}))


def memory_for(model: MoRModel, block_size: int, tokens: int, share: float = 1.0) -> int:
    """`kv_cache_memory_bytes` of a sequence whose tokens take every recursion, times `share`."""
    kv = LLM(model, EngineConfig(block_size=block_size, kv_cache_memory_bytes=2**24)).cache
    pages = max(int(kv.max_pages(model.config, tokens) * share), 1 + model.config.num_recursions)
    return pages * kv.page_bytes


def prompts_with_shared_starts(seed: int, num: int, max_length: int = 40) -> list[list[int]]:
    """Prompts that often begin alike."""
    rng = random.Random(seed)
    stems = [[rng.randrange(VOCAB) for _ in range(max_length)] for _ in range(2)]
    prompts = []
    for _ in range(num):
        stem = rng.choice(stems)[: rng.choice((0, 3, 8, 16, max_length - 3))]
        prompts.append([*stem, *(rng.randrange(VOCAB) for _ in range(rng.randint(1, 3)))])
    return prompts


@st.composite
def params(draw: st.DrawFn, num_recursions: int = 1, max_tokens: int = 8) -> SamplingParams:
    """Whatever a request can ask for, each thing in some of the cases."""
    fields: dict[str, Any] = {"max_tokens": draw(st.integers(1, max_tokens))}
    choices: dict[str, st.SearchStrategy[Any]] = {
        "repetition_penalty": st.floats(0.5, 2),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logprobs": st.integers(0, 20),
        "prompt_logprobs": st.just(True),
        "min_tokens": st.integers(0, fields["max_tokens"]),
        "stop_token_ids": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
        "ignore_eos": st.just(True),
        "n": st.integers(2, 3),
        "max_recursions": st.integers(1, num_recursions),
        "min_recursions": st.integers(1, num_recursions),
    }
    if draw(st.booleans()):  # what comes before may be taken from the prefix cache
        fields |= {"prompt_logprobs": True, "prompt_logprobs_from": draw(st.integers(1, 40))}
    if draw(st.booleans()):
        fields |= {"temperature": draw(st.floats(0.3, 2)), "seed": draw(st.integers(0, 99))}
        choices |= {
            "top_k": st.integers(1, 30),
            "top_p": st.floats(0.3, 1),
            "min_p": st.floats(0, 0.3),
        }
    for name in draw(st.sets(st.sampled_from(sorted(choices)), max_size=5)):
        fields[name] = draw(choices[name])
    if "min_recursions" in fields and "max_recursions" in fields:
        both = sorted((fields["min_recursions"], fields["max_recursions"]))
        fields["min_recursions"], fields["max_recursions"] = both
    return SamplingParams(**fields)


@st.composite
def engine_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of an EngineConfig, all but its memory."""
    maximum = draw(st.integers(1, 6))
    batching = draw(st.sampled_from(("depth", "depth", "sequence")))
    return {
        "block_size": draw(st.integers(1, 16)),
        "max_num_seqs": maximum,
        "max_num_batched_tokens": maximum + draw(st.integers(0, 24)),
        "chunked_prefill_size": draw(st.integers(1, 24)),
        "batching": batching,
        "num_scheduler_steps": draw(st.sampled_from((1, 1, 1, 2, 4)))
        if batching == "depth"
        else None,
        "min_exit_tokens": draw(st.integers(1, maximum)),
        "max_exit_wait_steps": draw(st.integers(0, 4)),
        "enable_prefix_caching": draw(st.booleans()),
    }


def run_all(
    llm: LLM, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[Completion]:
    """Completions in the order of the requests; every step leaves the engine whole."""
    names = [llm.add_request(p, each) for p, each in zip(prompts, params, strict=True)]
    done: dict[str, list[Completion]] = {}
    for _ in range(MAX_STEPS):
        for event in llm.step():
            if event.completions is not None:
                assert event.request_id not in done
                done[event.request_id] = event.completions
        llm.check_integrity()
        if not llm.has_unfinished_requests:
            break
    assert not llm.has_unfinished_requests, "the engine makes no progress"
    return [completion for name in names for completion in done[name]]


def step_until(llm: LLM, wanted: int, maximum: int = 500) -> list[TokenOutput]:
    """Step until so many outputs have come."""
    events: list[TokenOutput] = []
    for _ in range(maximum):
        if len(events) >= wanted:
            break
        events += llm.step()
    return events


def check_empty(llm: LLM) -> None:
    """Nothing is under way, and once the prefixes are forgotten all memory is free."""
    llm.check_integrity()
    assert not llm.has_unfinished_requests
    assert not llm.output_processor.has_unfinished_requests
    assert not llm.output_processor.unfinished_sequences()
    assert (llm.scheduler.waiting, llm.scheduler.running) == ([], [])
    llm.reset_prefix_cache()
    llm.check_integrity()
    assert llm.pool.num_free == llm.pool.num_pages
    assert llm.prefix_cache is None or len(llm.prefix_cache) == 0
    assert llm.step() == []


def check_same(got: Completion, want: Completion, tolerance: float = 1e-6) -> None:
    """Two completions agree in everything but their text."""
    assert got.prompt_token_ids == want.prompt_token_ids
    assert got.index == want.index
    assert got.token_ids == want.token_ids
    assert got.recursion_counts == want.recursion_counts
    assert got.prompt_recursion_counts == want.prompt_recursion_counts
    assert got.finish_reason == want.finish_reason
    check_close(got.logprobs, want.logprobs, tolerance)
    check_close(got.prompt_logprobs, want.prompt_logprobs, tolerance)
    check_same_tops(got.top_logprobs, want.top_logprobs, tolerance)
    assert [top is None for top in got.prompt_top_logprobs] == (
        [top is None for top in want.prompt_top_logprobs]
    )
    check_same_tops(
        [top or {} for top in got.prompt_top_logprobs],
        [top or {} for top in want.prompt_top_logprobs],
        tolerance,
    )


def check_same_tops(
    got: Sequence[dict[int, float]], want: Sequence[dict[int, float]], tolerance: float
) -> None:
    """The likeliest tokens in each place, in order."""
    assert [list(top) for top in got] == [list(top) for top in want]
    for top, other in zip(got, want, strict=True):
        check_close(list(top.values()), list(other.values()), tolerance)


def check_close(
    got: Sequence[float | None], want: Sequence[float | None], tolerance: float
) -> None:
    """Two lists of numbers, None in the same places."""
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one is other or (
            one is not None and other is not None and abs(one - other) <= tolerance
        )


def check_equals_oracle(
    llm: LLM,
    model: MoRModel,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    tolerance: float = 1e-6,
) -> None:
    """Run requests together; each must be what the reference generator makes of it."""
    got = run_all(llm, prompts, params)
    for one, want in zip(got, generate(model, prompts, params), strict=True):
        check_same(one, want, tolerance)
