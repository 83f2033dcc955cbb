"""Generating with the ragged cache equals recomputing the whole sequence at every step."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor.errors import RequestError
from mor.model.config import MoRConfig
from mor.model.generation import RaggedKVCache, batch_new_tokens, generate, pick
from mor.model.sampling import Completion, SamplingParams
from mor.model.sharing import UNSHARED
from mor.model.transformer import MoRModel
from tiny import KINDS, build, configs, tiny_model


def recompute(
    model: MoRModel, prompt: list[int], params: SamplingParams, index: int = 0
) -> tuple[list[int], list[int]]:
    """Tokens, and counts of all positions that were fed, both from full forward passes."""
    new: list[int] = []
    source = params.random_numbers(index)
    for _ in range(params.max_tokens):
        with torch.no_grad():
            out = model(torch.tensor([prompt + new]), selection="threshold")
        uniform = source.random()
        new.append(pick(out.logits[0, -1], params, uniform, prompt=prompt, output=new))
    return new, out.recursion_counts[0].tolist()


def check_equals_recompute(model: MoRModel, params: SamplingParams) -> None:
    prompts = [[5, 7, 11, 2], [3], [9, 1, 1, 8, 30, 60, 4, 4, 12]]
    for prompt, done in zip(prompts, generate(model, prompts, params), strict=True):
        tokens, counts = recompute(model, prompt, params)
        assert done.token_ids == tokens
        assert done.prompt_recursion_counts == counts[: len(prompt)]
        assert done.recursion_counts == counts[len(prompt) - 1 :]
        assert done.finish_reason == "length"


@given(config=configs(), seed=st.integers(0, 99))
def test_greedy_equals_recompute(config: MoRConfig, seed: int) -> None:
    check_equals_recompute(build(config, seed), SamplingParams(max_tokens=6))


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_equals_recompute(kind: str) -> None:
    params = SamplingParams(
        max_tokens=8,
        temperature=0.9,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        seed=4,
    )
    check_equals_recompute(tiny_model(kind), params)


def test_several_completions_of_each_prompt_come_in_order() -> None:
    model = tiny_model("expert")
    prompts = [[5, 7, 11], [3], [9, 1]]
    params = [
        SamplingParams(max_tokens=5, temperature=1.0, seed=7, n=3),
        SamplingParams(max_tokens=3),
        SamplingParams(max_tokens=4, temperature=1.0, n=2),
    ]
    done = generate(model, prompts, params)
    assert [(d.prompt_token_ids, d.index) for d in done] == [
        *(([5, 7, 11], i) for i in range(3)),
        ([3], 0),
        *(([9, 1], i) for i in range(2)),
    ]
    assert [len(d.token_ids) for d in done] == [5, 5, 5, 3, 4, 4]
    for index, one in enumerate(done[:3]):
        assert one.token_ids == recompute(model, prompts[0], params[0], index)[0]
        (alone,) = generate(
            model, [prompts[0]], SamplingParams(max_tokens=5, temperature=1.0, seed=7 + index)
        )
        assert alone.token_ids == one.token_ids
    assert len({tuple(d.token_ids) for d in done[:3]}) == 3


def test_logprobs_are_the_models() -> None:
    model = tiny_model("expert")
    (done,) = generate(model, [[1, 2, 3]], SamplingParams(max_tokens=5))
    ids = torch.tensor([[1, 2, 3, *done.token_ids]])
    logprobs = model(ids).logits.log_softmax(-1)[0]
    for i, (token, logprob) in enumerate(zip(done.token_ids, done.logprobs, strict=True)):
        assert logprobs[2 + i, token].item() == pytest.approx(logprob, abs=1e-9)


def test_prompt_and_top_logprobs_are_the_models() -> None:
    model = tiny_model("token")
    prompts = [[1, 2, 3], [4]]
    params = SamplingParams(
        max_tokens=4, temperature=2.0, repetition_penalty=2.0, logprobs=3, prompt_logprobs=True
    )
    for prompt, done in zip(prompts, generate(model, prompts, params), strict=True):
        ids = torch.tensor([prompt + done.token_ids])
        logprobs = model(ids).logits.log_softmax(-1)[0]
        assert done.prompt_logprobs[0] is None
        expected = [logprobs[i, token].item() for i, token in enumerate(prompt[1:])]
        assert done.prompt_logprobs[1:] == pytest.approx(expected, abs=1e-9)
        assert len(done.top_logprobs) == 4
        for row, top in zip(logprobs[len(prompt) - 1 :], done.top_logprobs, strict=False):
            best = row.topk(3)
            assert list(top) == best.indices.tolist()
            assert list(top.values()) == pytest.approx(best.values.tolist(), abs=1e-9)


def test_what_was_not_asked_for_is_empty() -> None:
    (done,) = generate(tiny_model("expert"), [[1, 2]], SamplingParams(max_tokens=2))
    assert (done.top_logprobs, done.prompt_logprobs, done.text, done.index) == ([], [], "", 0)
    (done,) = generate(tiny_model("expert"), [[1, 2]], SamplingParams(max_tokens=2, logprobs=0))
    assert done.top_logprobs == [{}, {}]


def num_entries(cache: RaggedKVCache, depth: int) -> int:
    """Tokens of sequence 0 with entries at a depth (UNSHARED: in prelude and coda)."""
    kept = cache._kept.items()
    return max((len(e[2]) for (key, seq), e in kept if (key.depth, seq) == (depth, 0)), default=0)


@pytest.mark.parametrize("kind", ["expert", "token", "expert_shared", "recursive"])
def test_each_depth_holds_only_its_own_tokens(kind: str) -> None:
    model = tiny_model(kind)
    cache = RaggedKVCache(model.config, 1)
    ragged = batch_new_tokens([0], [20], torch.device("cpu"))
    context = model.context(ragged, cache)
    ids = torch.randint(0, 61, (20,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = model.run_prelude(model.embed_tokens(ids), context)
        x, counts, _ = model.run_recursions(x, context, "threshold")
        model.run_coda(x, context)
    assert num_entries(cache, UNSHARED) == 20
    for depth in range(model.config.num_recursions):
        there = int((counts > depth).sum())
        shared_away = model.config.kv_strategy == "shared" and depth > 0
        assert num_entries(cache, depth) == (0 if shared_away else there)
    if kind in ("expert", "token"):
        assert 0 < num_entries(cache, 1) < 20  # the test would be empty without real dropping


def test_stop_tokens_and_neighbours() -> None:
    model = tiny_model("expert")
    (alone,) = generate(model, [[4, 5]], SamplingParams(max_tokens=10))
    stop = alone.token_ids[3]
    params = [
        SamplingParams(max_tokens=10, stop_token_ids=(stop,)),
        SamplingParams(max_tokens=12),
    ]
    stopped, other = generate(model, [[4, 5], [6, 7, 8]], params)
    cut = alone.token_ids.index(stop) + 1
    assert stopped.token_ids == alone.token_ids[:cut]
    assert stopped.finish_reason == "stop"
    assert other.token_ids == generate(model, [[6, 7, 8]], params[1])[0].token_ids


def test_the_models_end_of_text_ends_a_request_unless_ignored() -> None:
    def run(**fields: Any) -> Completion:
        (done,) = generate(model, [[4, 5]], SamplingParams(max_tokens=10, **fields))
        return done

    model = tiny_model("expert")
    free = run().token_ids
    eos = free[3]
    cut = free.index(eos) + 1
    model = tiny_model("expert", eos_token_id=eos)
    assert (run().token_ids, run().finish_reason) == (free[:cut], "stop")
    assert (run(ignore_eos=True).token_ids, run(ignore_eos=True).finish_reason) == (free, "length")
    both = run(ignore_eos=True, stop_token_ids=[free[1]])
    assert both.token_ids == free[: free.index(free[1]) + 1]
    late = run(min_tokens=7)
    assert late.token_ids[: cut - 1] == free[: cut - 1]
    assert eos not in late.token_ids[:7]
    held = run(min_tokens=10, stop_token_ids=[free[1]])
    assert not {eos, free[1]} & set(held.token_ids)
    assert held.finish_reason == "length"


def test_the_last_token_may_end_it() -> None:
    model = tiny_model("token")
    varied: dict[str, Any] = {"max_tokens": 3, "repetition_penalty": 100.0}
    (free,) = generate(model, [[4, 5]], SamplingParams(**varied))
    *before, last = free.token_ids
    assert last not in before
    params = SamplingParams(**varied, min_tokens=2, stop_token_ids=(last,))
    (done,) = generate(model, [[4, 5]], params)
    assert (done.token_ids, done.finish_reason) == (free.token_ids, "stop")


def test_params_are_one_for_all_or_one_for_each() -> None:
    model = tiny_model("vanilla")
    assert [len(d.token_ids) for d in generate(model, [[1], [2]])] == [64, 64]
    assert generate(model, [], SamplingParams()) == []
    with pytest.raises(RequestError, match="1 sampling params for 2 prompts"):
        generate(model, [[1], [2]], [SamplingParams()])


def test_the_callback_counts_completions() -> None:
    seen: list[int] = []
    params = SamplingParams(max_tokens=2, temperature=1.0, n=2)
    generate(tiny_model("token"), [[1], [2]], params, on_token=lambda n, *_: seen.append(n))
    assert sorted(seen) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        ([[]], {}, "empty"),
        ([[61]], {}, "token id 61"),
        ([[-1]], {}, "token id -1"),
        ([[1] * 90], {"max_tokens": 10}, "the model takes 96"),
        ([[1]], {"stop": "end"}, "prompt 0: stop=.* needs a tokenizer"),
        ([[1]], {"stop_token_ids": [3, 61]}, "stop_token_ids holds 61, outside 0..60"),
        ([[1]], {"stop_token_ids": list(range(61)), "min_tokens": 1}, "min_tokens=1 forbids"),
        ([[1]], {"min_recursions": 4}, "min_recursions=4 must lie in 1..3"),
        ([[1]], {"max_recursions": 4}, "max_recursions=4 must lie in 1..3.*num_recursions=3"),
    ],
)
def test_bad_requests_are_named(prompts: list[list[int]], params: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        generate(tiny_model("expert"), prompts, SamplingParams(**params))
