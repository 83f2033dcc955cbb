"""The engine gives what the reference generator gives, whatever its settings and the company."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_helpers import (
    EOS,
    check_empty,
    check_equals_oracle,
    check_same,
    engine_settings,
    memory_for,
    params,
    prompts_with_shared_starts,
    run_all,
    shared_model,
)
from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.model.config import MoRConfig
from mor.model.generation import generate
from mor.model.sampling import SamplingParams
from tiny import KINDS, build, configs

SETTINGS: dict[str, dict[str, Any]] = {
    "small": {
        "block_size": 3,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 7,
        "chunked_prefill_size": 5,
    },
    "tight": {"block_size": 2, "max_num_seqs": 6, "chunked_prefill_size": 7, "min_exit_tokens": 3},
    "sequence": {
        "block_size": 5,
        "max_num_seqs": 4,
        "chunked_prefill_size": 9,
        "batching": "sequence",
    },
}
SAMPLED = SamplingParams(
    max_tokens=6,
    temperature=0.9,
    top_k=25,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    seed=4,
    logprobs=4,
)
REQUESTS = (
    SamplingParams(max_tokens=9, logprobs=3, prompt_logprobs=True),
    SAMPLED,
    replace(SAMPLED, n=3, min_tokens=3, stop_token_ids=tuple(range(20)), prompt_logprobs=True),
    SamplingParams(max_tokens=1),
    SamplingParams(max_tokens=8, temperature=1.5, seed=9, ignore_eos=True),
    SamplingParams(max_tokens=8, temperature=1.5, seed=1, stop_token_ids=tuple(range(20, 40))),
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_the_oracle(kind: str) -> None:
    check_kind(kind, "tight")


@pytest.mark.parametrize("kind", ["expert", "token_loss_free"])
@pytest.mark.parametrize("setting", ["small", "sequence"])
def test_some_kinds_in_other_settings(kind: str, setting: str) -> None:
    check_kind(kind, setting)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["small", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_other_settings(kind: str, setting: str) -> None:
    check_kind(kind, setting)


def check_kind(kind: str, setting: str) -> None:
    model = shared_model(kind, eos_token_id=EOS)
    fields = {
        "max_num_batched_tokens": 24,
        "enable_prefix_caching": setting != "sequence",
        **SETTINGS[setting],
    }
    memory = memory_for(model, fields["block_size"], 49, 1.3 if setting == "tight" else 12)
    llm = LLM(model, EngineConfig(**fields, kv_cache_memory_bytes=memory))
    prompts = prompts_with_shared_starts(len(setting), 6)
    check_equals_oracle(llm, model, prompts, REQUESTS)
    check_equals_oracle(llm, model, prompts[::-1], REQUESTS)  # prefixes of the first round
    check_empty(llm)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "sequence"])
def test_recursion_limits_equal_the_oracle(kind: str) -> None:
    model = shared_model(kind)
    maximum = model.config.num_recursions
    limits = [
        {},
        *({"min_recursions": r, "max_recursions": r} for r in range(1, maximum + 1)),
        {"max_recursions": 1},
    ]
    asked = [SamplingParams(max_tokens=5, **fields) for fields in [*limits, *limits]]
    prompts = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, n // len(limits)] for n in range(len(asked))]
    llm = LLM(model, EngineConfig(block_size=4, max_num_seqs=7, kv_cache_memory_bytes=2**22))
    check_equals_oracle(llm, model, prompts, asked)
    assert llm.prefix_cache is not None
    assert len(llm.prefix_cache) >= 2 * len({str(sorted(fields.items())) for fields in limits})


@given(config=configs(), data=st.data())
def test_any_model_in_any_engine_equals_the_oracle(config: MoRConfig, data: st.DataObject) -> None:
    config = replace(config, eos_token_id=data.draw(st.sampled_from((None, EOS))))
    model = build(config, data.draw(st.integers(0, 9)))
    num = data.draw(st.integers(1, 5))
    prompts = prompts_with_shared_starts(data.draw(st.integers(0, 99)), num, 24)
    maximum = 1 if config.sharing == "sequence" else config.num_recursions
    asked = [
        replace(p, min_recursions=None, max_recursions=None) if config.sharing == "sequence" else p
        for p in (data.draw(params(maximum)) for _ in range(num))
    ]
    fields = data.draw(engine_settings())
    if config.relaxation_rank:  # needs the host after each step
        fields["num_scheduler_steps"] = None
    memory = memory_for(model, fields["block_size"], 32, data.draw(st.floats(1.0, 3.0)))
    llm = LLM(model, EngineConfig(**fields, kv_cache_memory_bytes=memory))
    check_equals_oracle(llm, model, prompts, asked)
    check_empty(llm)


@pytest.mark.parametrize("kind", ["expert", "token_shared", "expert_bare"])
def test_neighbours_do_not_matter(kind: str) -> None:
    model = shared_model(kind)
    config = EngineConfig(
        block_size=4, max_num_seqs=5, max_num_batched_tokens=16, chunked_prefill_size=6
    )
    prompts = prompts_with_shared_starts(5, 6)
    together = run_all(LLM(model, config), prompts, REQUESTS)
    llm = LLM(model, config)
    alone = [run_all(llm, [p], [each]) for p, each in zip(prompts, REQUESTS, strict=True)]
    for one, other in zip((c for cs in alone for c in cs), together, strict=True):
        check_same(one, other, 1e-9)


def test_tight_memory_preempts_and_changes_nothing() -> None:
    model = shared_model("expert")
    memory = memory_for(model, 2, 60)
    llm = LLM(model, EngineConfig(block_size=2, max_num_seqs=6, kv_cache_memory_bytes=memory))
    prompts = [[n, 5, 7, 11] for n in range(6)]
    asked = [
        SamplingParams(max_tokens=40, temperature=t, seed=3, logprobs=2, prompt_logprobs=True)
        for t in (0.0, 1.0) * 3
    ]
    check_equals_oracle(llm, model, prompts, asked)
    assert llm.scheduler.num_preemptions >= 3
    check_empty(llm)


def test_requests_that_come_later_are_served_alike() -> None:
    model = shared_model("token")
    llm = LLM(
        model,
        EngineConfig(
            block_size=4, max_num_seqs=3, max_num_batched_tokens=8, chunked_prefill_size=5
        ),
    )
    prompts = prompts_with_shared_starts(1, 8)
    asked = [SamplingParams(max_tokens=7, temperature=1.0, seed=n) for n in range(8)]
    done = {}
    for number, (prompt, each) in enumerate(zip(prompts, asked, strict=True)):
        llm.add_request(prompt, each, str(number))
        for _ in range(number):
            done |= {e.request_id: e.completions for e in llm.step() if e.completions}
    while llm.has_unfinished_requests:
        done |= {e.request_id: e.completions for e in llm.step() if e.completions}
    for number, want in enumerate(generate(model, prompts, asked)):
        check_same(done[str(number)][0], want)
