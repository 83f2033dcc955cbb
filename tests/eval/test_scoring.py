"""Log-likelihoods on the engine and by top-k: those of a plain forward pass over each sequence."""

import random
from functools import cache
from typing import Any

import pytest
import torch

import mor
from mor.errors import RequestError
from mor.eval import scoring
from mor.eval.scoring import EngineScorer, LoglikelihoodRequest, TopkScorer
from mor.model.transformer import MoRModel
from tiny import tiny_model

KINDS = ("vanilla", "expert", "expert_shared", "token", "sequence")


def pairs_of(seed: int, num: int = 24) -> list[LoglikelihoodRequest]:
    """Contexts that several continuations share, long ones and short ones."""
    draw = random.Random(seed)
    contexts = [tuple(draw.choices(range(61), k=k)) for k in (1, 5, 17, 40, 40, 60)]
    contexts.append((*contexts[-1][:50], 1, 2, 3))
    return [
        LoglikelihoodRequest(
            draw.choice(contexts), tuple(draw.choices(range(61), k=draw.randint(1, 9)))
        )
        for _ in range(num)
    ]


def reference(model: MoRModel, pair: LoglikelihoodRequest, selection: Any) -> tuple[float, bool]:
    ids = torch.tensor([[*pair.context, *pair.continuation]])
    with torch.no_grad():
        logprobs = model(ids[:, :-1], selection=selection).logits[0].log_softmax(-1)
    after, wanted = logprobs[len(pair.context) - 1 :], ids[0, len(pair.context) :]
    greedy = bool((after.argmax(-1) == wanted).all())
    return float(after.gather(1, wanted[:, None]).sum()), greedy


@cache
def scored(kind: str) -> tuple[MoRModel, list[LoglikelihoodRequest], list[tuple[float, bool]]]:
    """A model, pairs, one of which goes on greedily, and what a forward pass over each says."""
    model, pairs = tiny_model(kind), pairs_of(len(kind))
    pairs[3] = LoglikelihoodRequest((2, 3), tuple(reference_greedy(model, (2, 3), 2)))
    return model, pairs, [reference(model, pair, "threshold") for pair in pairs]


def engine(model: MoRModel, **fields: Any) -> EngineScorer:
    return EngineScorer(
        mor.LLM(model, mor.EngineConfig(**{"kv_cache_memory_bytes": 2**22, **fields}))
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wave", [1, 200, 10**6])
def test_scores_are_those_of_a_forward_pass(
    kind: str, wave: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_WAVE_TOKENS", wave)
    (model, pairs, wanted), done = scored(kind), list[int]()
    scorer = engine(model, block_size=8, max_num_batched_tokens=64, chunked_prefill_size=16)
    for (logprob, greedy), score in zip(wanted, scorer.score(pairs, done.append), strict=True):
        assert score.logprob == pytest.approx(logprob, abs=1e-6)
        assert score.is_greedy == greedy
    assert scorer.score([pairs[3]], done.append)[0].is_greedy
    assert sum(done) == len(pairs) + 1


def reference_greedy(model: MoRModel, context: tuple[int, ...], num: int) -> list[int]:
    params = mor.SamplingParams(max_tokens=num, ignore_eos=True)
    return mor.generate(model, [list(context)], params)[0].token_ids


def test_a_shared_context_is_computed_once() -> None:
    context = tuple(range(33))
    pairs = [LoglikelihoodRequest(context, (40 + i, 7)) for i in range(5)]
    tokens = {}
    for caching in (True, False):
        scorer = engine(tiny_model("vanilla"), block_size=8, enable_prefix_caching=caching)
        scorer.score(pairs, lambda _: None)
        tokens[caching] = scorer.llm.stats.block_tokens
    assert tokens == {True: 35 + 4 * 3, False: 5 * 35}


@pytest.mark.parametrize("kind", ["expert", "expert_aux_router", "token"])
def test_topk_scores_are_those_of_the_whole_sequence(kind: str) -> None:
    model, pairs = tiny_model(kind), pairs_of(7)
    scores = TopkScorer(model).score(pairs, lambda _: None)
    for pair, score in zip(pairs, scores, strict=True):
        logprob, greedy = reference(model, pair, "topk")
        assert score.logprob == pytest.approx(logprob, abs=1e-4)  # summed in fp32
        assert score.is_greedy == greedy
    if kind != "token":
        causal = engine(model).score(pairs, lambda _: None)
        assert [s.logprob for s in causal] != pytest.approx([s.logprob for s in scores], abs=1e-3)


def test_a_long_context_loses_its_beginning_and_a_long_continuation_is_refused() -> None:
    model = tiny_model("expert")  # takes 96 tokens
    long = LoglikelihoodRequest(tuple(i % 61 for i in range(150)), (1, 2, 3))
    kept = LoglikelihoodRequest(long.context[-92:], long.continuation)
    (score,) = engine(model).score([long], lambda _: None)
    assert score.logprob == pytest.approx(reference(model, kept, "threshold")[0], abs=1e-6)
    for pair in (
        LoglikelihoodRequest((1,), (2,) * 95),
        LoglikelihoodRequest((), (1,)),
        LoglikelihoodRequest((1,), ()),
    ):
        with pytest.raises(RequestError, match="continuation"):
            engine(model).score([pair], lambda _: None)
    with pytest.raises(RequestError, match="selection='threshold'"):
        TopkScorer(model).generate([[1]], [mor.SamplingParams()])
