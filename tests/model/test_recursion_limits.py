"""A user's limits on recursions: held by every token, and the same in cache and whole sequence."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor.model.attention import FullSequenceAttention
from mor.model.config import MoRConfig
from mor.model.generation import generate
from mor.model.ragged_batch import RaggedBatch
from mor.model.router import RecursionLimits
from mor.model.sampling import Completion, SamplingParams
from mor.model.transformer import MoRModel
from reference_model import Naive
from tiny import KINDS, build, configs, tiny_config, tiny_model

PROMPTS = [[5, 7, 11, 2], [3], [9, 1, 1, 8, 30, 60, 4, 4, 12]]


def check_equals_recompute(model: MoRModel, done: Completion, params: SamplingParams) -> None:
    """Tokens and counts are those of whole, naive forward passes under the same limits."""
    naive = Naive(model, "threshold", *params.recursion_range(model.config.num_recursions))
    prompt, new = done.prompt_token_ids, list[int]()
    for _ in range(params.max_tokens):
        logits, counts = naive.logits(torch.tensor(prompt + new))
        new.append(int(logits[-1].argmax()))
    assert done.token_ids == new
    assert done.prompt_recursion_counts + done.recursion_counts[1:] == counts.tolist()


def asked(name: str, value: int) -> SamplingParams:
    """Every token takes exactly so many recursions ("exactly"), or at most so many."""
    if name == "exactly":
        return SamplingParams(max_tokens=5, min_recursions=value, max_recursions=value)
    return SamplingParams(max_tokens=5, max_recursions=value)


def possible(config: MoRConfig) -> range:
    """What can be asked of a model."""
    minimum = config.num_recursions if config.sharing == "sequence" else 1
    return range(minimum, config.num_recursions + 1)


@torch.no_grad()
def check_limits(model: MoRModel, name: str, value: int) -> None:
    params = asked(name, value)
    for done in generate(model, PROMPTS, params):
        check_equals_recompute(model, done, params)
        counts = done.prompt_recursion_counts + done.recursion_counts
        if name == "exactly":
            assert set(counts) == {value}
        else:
            assert max(counts) <= value


@pytest.mark.parametrize("name", ["exactly", "max_recursions"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_to_the_limit(kind: str, name: str) -> None:
    for value in possible(tiny_config(kind)):
        check_limits(tiny_model(kind), name, value)


@given(config=configs(), seed=st.integers(0, 99), data=st.data())
def test_any_model_keeps_to_the_limit(config: MoRConfig, seed: int, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["exactly", "max_recursions"]))
    check_limits(build(config, seed), name, data.draw(st.sampled_from(possible(config))))


@pytest.mark.parametrize("kind", ["expert", "expert_bare", "expert_shared", "token", "recursive"])
def test_neighbours_with_other_limits_change_nothing(kind: str) -> None:
    model = tiny_model(kind)
    params = [asked("exactly", 2), asked("max_recursions", 1), SamplingParams(max_tokens=5)]
    for prompt, p, done in zip(PROMPTS, params, generate(model, PROMPTS, params), strict=True):
        (alone,) = generate(model, [prompt], p)
        assert done.logprobs == pytest.approx(alone.logprobs, abs=1e-9)
        assert (done.token_ids, done.recursion_counts) == (alone.token_ids, alone.recursion_counts)


@pytest.mark.parametrize("kind", ["expert", "expert_bare", "token"])
def test_a_limit_that_all_keep_to_changes_nothing(kind: str) -> None:
    model = tiny_model(kind)
    free = generate(model, PROMPTS, SamplingParams(max_tokens=5))
    assert generate(model, PROMPTS, asked("max_recursions", model.config.num_recursions)) == free
    assert len({c for done in free for c in done.prompt_recursion_counts}) > 1


def whole(model: MoRModel, limits: RecursionLimits | None, num: int, selection: Any) -> Any:
    """States and counts of one sequence."""
    ragged = RaggedBatch.full(1, num, torch.device("cpu"))
    context = model.context(ragged, FullSequenceAttention(model.config))
    x = model.embed_tokens(torch.arange(num))
    return model.run_recursions(x, context, selection, limits=limits)[:2]


@torch.no_grad()
def test_each_token_has_its_own_limits() -> None:
    minimum = torch.tensor([0, 3, 1, 2, 0, 0, 3, 1])
    maximum = torch.tensor([3, 3, 1, 2, 1, 2, 3, 3])
    limits = RecursionLimits(min_recursions=minimum, max_recursions=maximum)
    for kind in ("expert", "token", "recursive"):
        _, free = whole(tiny_model(kind), None, 8, "threshold")
        _, counts = whole(tiny_model(kind), limits, 8, "threshold")
        assert (counts <= maximum).all()
        assert (counts >= minimum).all()
        if kind == "token":  # the router looks at nothing that a limit changes
            assert torch.equal(counts, free.clamp(minimum, maximum))
        if kind == "recursive":
            assert torch.equal(counts, maximum)


def test_topk_takes_no_limits() -> None:
    limits = RecursionLimits(
        min_recursions=torch.ones(8).long(), max_recursions=torch.ones(8).long()
    )
    with pytest.raises(AssertionError, match="topk"):
        whole(tiny_model("expert"), limits, 8, "topk")
