"""Generating with the ragged cache equals recomputing the whole sequence at every step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mor.errors import RequestError
from mor.model.config import MoRConfig
from mor.model.generation import RaggedKVCache, SamplingParams, generate, pick, ragged_packing
from mor.model.mor import MoRModel
from mor.model.sharing import UNSHARED
from tiny import KINDS, build, configs, tiny_model


def recompute(model: MoRModel, prompt: list[int], params: SamplingParams) -> tuple[list[int], ...]:
    """Tokens, counts of all positions, both from full forward passes."""
    ids, new = list(prompt), []
    generator = torch.Generator()
    generator.manual_seed(params.seed or 0)
    counts: list[int] = []
    for _ in range(params.max_tokens):
        with torch.no_grad():
            out = model(torch.tensor([ids]), selection="threshold")
        counts = out.recursion_counts[0].tolist()
        token, _ = pick(out.logits[0, -1], params, generator)
        ids.append(token)
        new.append(token)
    return new, counts


def check_equals_recompute(model: MoRModel, params: SamplingParams) -> None:
    prompts = [[5, 7, 11, 2], [3], [9, 1, 1, 8, 30, 60, 4, 4, 12]]
    for prompt, done in zip(prompts, generate(model, prompts, params), strict=True):
        tokens, counts = recompute(model, prompt, params)
        assert done.token_ids == tokens
        assert done.prompt_recursion_counts == counts[: len(prompt)]
        assert done.recursion_counts == counts[len(prompt) - 1 :]
        assert done.finish_reason == "length"


@settings(max_examples=25)
@given(config=configs(), seed=st.integers(0, 99))
def test_greedy_equals_recompute(config: MoRConfig, seed: int) -> None:
    check_equals_recompute(build(config, seed), SamplingParams(max_tokens=6))


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_equals_recompute(kind: str) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.9, top_k=20, top_p=0.9, seed=4)
    check_equals_recompute(tiny_model(kind), params)


def test_logprobs_are_the_models() -> None:
    model = tiny_model("expert")
    (done,) = generate(model, [[1, 2, 3]], SamplingParams(max_tokens=5))
    ids = torch.tensor([[1, 2, 3, *done.token_ids]])
    logprobs = model(ids).logits.log_softmax(-1)[0]
    for i, (token, logprob) in enumerate(zip(done.token_ids, done.logprobs, strict=True)):
        assert logprobs[2 + i, token].item() == pytest.approx(logprob, abs=1e-9)


@pytest.mark.parametrize("kind", ["expert", "token", "expert_shared", "recursive"])
def test_each_depth_holds_only_its_own_tokens(kind: str) -> None:
    model = tiny_model(kind)
    cache = RaggedKVCache(model.config, 1)
    packing = ragged_packing([0], [20], torch.device("cpu"))
    context = model.context(packing, cache)
    ids = torch.randint(0, 61, (20,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = model.run_prelude(model.embed_tokens(ids), context)
        x, counts, _ = model.recurse(x, context, "threshold")
        model.run_coda(x, context)
    assert cache.num_entries(UNSHARED, 0) == 20
    for depth in range(model.config.num_recursions):
        there = int((counts > depth).sum())
        shared_away = model.config.kv_strategy == "shared" and depth > 0
        assert cache.num_entries(depth, 0) == (0 if shared_away else there)
    if kind in ("expert", "token"):
        assert 0 < cache.num_entries(1, 0) < 20  # the test would be empty without real dropping


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


def test_callback_sees_every_token_in_order() -> None:
    model = tiny_model("token")
    seen: list[tuple[int, int, int]] = []
    done = generate(
        model,
        [[1, 2], [3]],
        SamplingParams(max_tokens=4),
        on_token=lambda *event: seen.append(event),
    )
    for i in range(2):
        mine = [(t, c) for n, t, c in seen if n == i]
        assert mine == list(zip(done[i].token_ids, done[i].recursion_counts, strict=True))


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64))
    params = SamplingParams(temperature=1.0, top_p=0.7)
    generator = torch.Generator().manual_seed(0)
    drawn = {pick(logits, params, generator)[0] for _ in range(200)}
    assert drawn == {0, 1}


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        ([[]], {}, "empty"),
        ([[61]], {}, "token id 61"),
        ([[-1]], {}, "token id -1"),
        ([[1] * 90], {"max_tokens": 10}, "the model takes 96"),
    ],
)
def test_bad_requests_are_named(prompts: list[list[int]], params: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        generate(tiny_model("expert"), prompts, SamplingParams(**params))


@pytest.mark.parametrize(
    "bad", [{"max_tokens": 0}, {"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}]
)
def test_bad_sampling_params_are_named(bad: dict) -> None:
    with pytest.raises(RequestError, match=next(iter(bad))):
        SamplingParams(**bad)
