"""The engine on the compiled CPU kernels, in float32 and below."""

from functools import cache
from typing import Any

import pytest
import torch

from engine_helpers import VOCAB, check_close, check_empty, prompts_with_shared_starts, run_all
from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.model.generation import generate
from mor.model.router import ExpertChoiceRouter, TokenChoiceRouter
from mor.model.sampling import Completion, SamplingParams
from mor.model.transformer import MoRModel
from tiny import KINDS, build, tiny_config, tiny_model

WIDE = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "vocab_size": VOCAB}
CLEAR = 1e-4
"""A decision by less than this may fall otherwise in float32."""
REQUESTS = (
    SamplingParams(max_tokens=20, prompt_logprobs=True),
    SamplingParams(max_tokens=12, temperature=0.8, seed=3, logprobs=5),
    SamplingParams(max_tokens=1),
    SamplingParams(max_tokens=16, repetition_penalty=1.3),
)


@cache
def model_of(kind: str) -> MoRModel:
    """In float32; tests must not change it."""
    return build(tiny_config(kind, **WIDE)).float()


@cache
def exact_model_of(kind: str) -> MoRModel:
    """The same weights in float64."""
    model = build(tiny_config(kind, **WIDE))
    model.load_state_dict(model_of(kind).state_dict())
    return model


def cpu_engine(model: MoRModel, **fields: Any) -> LLM:
    return LLM(model, EngineConfig(kernels="cpu", **{"kv_cache_memory_bytes": 2**22, **fields}))


@cache
@torch.no_grad()
def clearance(kind: str, ids: tuple[int, ...]) -> float:
    """The smallest distance of any decision from falling otherwise: a router's, or argmax's."""
    model = exact_model_of(kind)
    router, chosen = model.router, []
    if isinstance(router, TokenChoiceRouter):
        hook = router.router.register_forward_hook(lambda _, __, out: chosen.append(out))
        states, _, record = model.hidden_states(torch.tensor([ids]), "threshold")
        hook.remove()
    else:
        states, _, record = model.hidden_states(torch.tensor([ids]), "threshold")
    margins = [model.compute_logits(states).topk(2).values.diff().abs().min()]
    if isinstance(router, ExpertChoiceRouter):
        margins += [
            (logits - router.threshold(depth)).abs().min()
            for depth, logits in enumerate(record.decisions)
            if len(logits)
        ]
    elif isinstance(router, TokenChoiceRouter):
        softmax = router.config.router_activation == "softmax"
        score = chosen[0].softmax(-1) if softmax else chosen[0].sigmoid()
        score = score * router.config.router_alpha + getattr(router, "bias", 0)
        margins.append(score.topk(2).values.diff().abs().min())
    return float(min(margins))


@pytest.mark.parametrize("kind", [k for k in KINDS if not tiny_config(k).qk_norm])
def test_float32_equals_the_oracle_in_float32(kind: str) -> None:
    model = model_of(kind)
    llm = cpu_engine(
        model, max_num_seqs=6, max_num_batched_tokens=40, chunked_prefill_size=20, min_exit_tokens=2
    )
    prompts = prompts_with_shared_starts(7, 8, 40)
    asked = [REQUESTS[n % len(REQUESTS)] for n in range(len(prompts))]
    set_aside = 0
    wanted = generate(model, prompts, asked)
    for round_ in range(2):  # the second one finds prefixes
        for got, want in zip(run_all(llm, prompts, asked), wanted, strict=True):
            if clearance(kind, (*want.prompt_token_ids, *want.token_ids[:-1])) < CLEAR:
                set_aside += 1
                continue
            check_same_within(got, want, 1e-4)
        assert set_aside <= 3 * (round_ + 1), f"{set_aside} requests were too close to call"
    check_empty(llm)


def check_same_within(got: Completion, want: Completion, tolerance: float) -> None:
    assert got.token_ids == want.token_ids
    assert got.recursion_counts == want.recursion_counts
    assert got.prompt_recursion_counts == want.prompt_recursion_counts
    assert got.finish_reason == want.finish_reason
    check_close(got.logprobs, want.logprobs, tolerance)
    check_close(got.prompt_logprobs, want.prompt_logprobs, tolerance)
    for top, other in zip(got.top_logprobs, want.top_logprobs, strict=True):
        check_close(sorted(top.values()), sorted(other.values()), tolerance)


def prompt_scores(llm: LLM, prompts: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of the prompts' tokens."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=True)
    done = llm.generate(prompts, params)
    return torch.tensor([score for c in done for score in c.prompt_logprobs[1:]])


@pytest.mark.parametrize("kind", ["vanilla", "recursive", "recursive_shared", "expert_random"])
@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [({"dtype": "bfloat16"}, 0.05), ({"quantization": "int8"}, 0.05), ({"block_size": 32}, 1e-5)],
)
def test_smaller_weights_give_nearly_the_same(
    kind: str, fields: dict[str, Any], tolerance: float
) -> None:
    prompts = prompts_with_shared_starts(3, 6, 60)
    want = prompt_scores(cpu_engine(model_of(kind)), prompts)
    got = prompt_scores(cpu_engine(model_of(kind), **fields), prompts)
    assert 0 < (got - want).abs().mean() < tolerance or fields == {"block_size": 32}
    assert (got - want).abs().max() < 8 * tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_runs(dtype: torch.dtype) -> None:
    prompts = prompts_with_shared_starts(3, 4, 60)
    model = build(tiny_config("recursive", **WIDE)).to(dtype)
    llm = cpu_engine(model, dtype="float32" if dtype == torch.float64 else None)
    same = build(tiny_config("recursive", **WIDE)).to(dtype).float()
    want = prompt_scores(
        LLM(same, EngineConfig(kernels="reference", kv_cache_memory_bytes=2**22)), prompts
    )
    assert (prompt_scores(llm, prompts) - want).abs().max() < 1e-4
    assert next(model.parameters()).dtype == dtype


def test_what_was_cut_or_grown_by_padding_stays_out() -> None:
    """A vocabulary that fills no whole panel, int8 included, never gives an unknown token."""
    for vocab in (61, 64, 17, 5):
        model = tiny_model("expert", **{**WIDE, "vocab_size": vocab}).float()
        for fields in ({}, {"quantization": "int8"}):
            params = SamplingParams(max_tokens=10, temperature=50.0, seed=1, logprobs=20, n=3)
            for done in cpu_engine(model, **fields).generate([[1, 2]], params):
                assert all(0 <= token < vocab for token in done.token_ids)
                assert all(len(top) == min(20, vocab) for top in done.top_logprobs)


def test_threads_change_nothing() -> None:
    prompts = prompts_with_shared_starts(3, 6, 60)
    params = SamplingParams(max_tokens=8)
    one, two = (
        cpu_engine(model_of("expert"), num_threads=threads).generate(prompts, params)
        for threads in (1, 2)
    )
    for got, want in zip(two, one, strict=True):
        check_same_within(got, want, 1e-6)


def test_it_is_the_default_where_it_fits() -> None:
    assert (
        LLM(model_of("expert"), EngineConfig(kv_cache_memory_bytes=2**22)).backend.kernels == "cpu"
    )
