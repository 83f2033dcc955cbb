"""`LLM` as its callers see it: requests, errors, interruptions, streams."""

import itertools
from typing import Any

import pytest

from engine_helpers import (
    VOCAB,
    check_empty,
    check_same,
    engine_of,
    memory_for,
    shared_model,
    step_until,
)
from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.errors import CapacityError, RequestError
from mor.model.generation import generate
from mor.model.sampling import Completion, SamplingParams

GREEDY = SamplingParams(max_tokens=10)
SAMPLED = SamplingParams(max_tokens=12, temperature=1.0, seed=3, logprobs=2, prompt_logprobs=True)


class Text(list[int]):
    """Hides from the type checks of `make test`, which look at an item, what a prompt really is."""

    def __iter__(self) -> Any:
        return iter(["a"])


# -- what is refused ------------------------------------------------------------------------------

BAD_REQUESTS: list[tuple[Any, SamplingParams, str]] = [
    ([], GREEDY, "is empty"),
    ([3, VOCAB], GREEDY, f"token id {VOCAB}"),
    ([-1], GREEDY, "token id -1"),
    (Text([1]), GREEDY, "must be a text or a list of token ids"),
    ([1] * 90, GREEDY, "the model takes 96"),
    ("text", GREEDY, "needs a tokenizer"),
    ([1], SamplingParams(stop="x"), "need a tokenizer"),
    ([1], SamplingParams(min_recursions=4, max_recursions=4), "recursions=4"),
    ([1], SamplingParams(stop_token_ids=[VOCAB]), "stop_token_ids"),
]


def test_a_refused_request_leaves_the_others_running() -> None:
    llm = engine_of()
    name = llm.add_request([5, 7, 11], SAMPLED, "mine")
    step_until(llm, 3)
    for prompt, params, words in BAD_REQUESTS:
        with pytest.raises(RequestError, match=words):
            llm.add_request(prompt, params)
        with pytest.raises(RequestError, match=words):
            llm.generate([[1, 2], prompt], [GREEDY, params])
        llm.check_integrity()
    with pytest.raises(RequestError, match="'mine' is in use"):
        llm.add_request([1], GREEDY, name)
    with pytest.raises(RequestError, match="into a list"):
        llm.generate("text")
    with pytest.raises(RequestError, match="3 sampling params for 2 prompts"):
        llm.generate([[1], [2]], [GREEDY] * 3)
    assert llm.scheduler.waiting == []
    done = [e.completions for e in step_until(llm, 9) if e.completions]
    (want,) = generate(shared_model("expert"), [[5, 7, 11]], SAMPLED)
    check_same(done[0][0], want)
    check_empty(llm)


def test_what_can_never_fit_is_refused_at_once() -> None:
    model = shared_model("expert")
    memory = memory_for(model, 4, 30)
    llm = LLM(model, EngineConfig(block_size=4, kv_cache_memory_bytes=memory))
    llm.add_request([1, 2, 3], GREEDY, "small")
    for prompt, maximum in (([1] * 20, 14), ([1] * 33, 1), ([1], 33)):
        with pytest.raises(CapacityError, match="raise kv_cache_memory_bytes"):
            llm.add_request(prompt, SamplingParams(max_tokens=maximum))
    fitting = [([1] * 20, 13), ([1] * 32, 1), ([1], 32)]  # the last token is never fed
    for prompt, maximum in fitting:
        llm.add_request(
            prompt, SamplingParams(max_tokens=maximum, min_recursions=3, max_recursions=3)
        )
    done = {e.request_id: e.completions[0] for e in step_until(llm, 56) if e.completions}
    assert len(done) == 4
    check_same(done["small"], generate(model, [[1, 2, 3]], GREEDY)[0])
    check_empty(llm)


def test_names_are_the_callers_or_new() -> None:
    llm = engine_of()
    assert llm.add_request([1], GREEDY, "request-1") == "request-1"
    names = [llm.add_request([n], GREEDY) for n in range(3)]
    assert len({*names, "request-1"}) == 4
    assert len(llm.generate([[1], [2]], SamplingParams(max_tokens=2))) == 2
    while llm.has_unfinished_requests:
        llm.step()
    assert llm.add_request([1], GREEDY, "request-1") == "request-1"  # free again
    assert len(llm.abort("request-1")) == 1
    check_empty(llm)


# -- aborts, interruptions, streams ---------------------------------------------------------------


def test_abort_gives_what_there_is() -> None:
    llm = engine_of()
    (want,) = generate(shared_model("expert"), [[5, 7]], GREEDY)
    name = llm.add_request([5, 7], GREEDY)
    step_until(llm, 4)
    (done,) = llm.abort(name)
    assert done.token_ids == want.token_ids[:4]
    assert done.recursion_counts == want.recursion_counts[:4]
    assert done.finish_reason == "abort"
    assert llm.abort(name) == llm.abort("nobody") == []
    check_empty(llm)


@pytest.mark.parametrize("phase", ["run_prelude", "run_block", "run_coda"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_step_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, phase: str, error: type[BaseException]
) -> None:
    llm = engine_of()
    prompts = [[5, 7, 11, *range(9)], [5, 7, 11, *range(6), 1], [8]]
    names = [llm.add_request(p, SAMPLED) for p in prompts]
    original, calls = getattr(llm.runner, phase), itertools.count()

    def fail_at_times(*args: Any) -> Any:
        if next(calls) % 9 == 8:
            raise error("now")
        return original(*args)

    monkeypatch.setattr(llm.runner, phase, fail_at_times)
    done: dict[str, Completion] = {}
    tokens: dict[str, list[int]] = {name: [] for name in names}
    failures = 0
    for _ in range(600):
        if not llm.has_unfinished_requests:
            break
        try:
            for event in llm.step():
                tokens[event.request_id].append(event.token_id)
                if event.completions:
                    done[event.request_id] = event.completions[0]
        except error:
            failures += 1
        llm.check_integrity()
    assert failures >= 3
    for name, want in zip(names, generate(shared_model("expert"), prompts, SAMPLED), strict=True):
        check_same(done[name], want)
        assert tokens[name] == want.token_ids
    check_empty(llm)


@pytest.mark.parametrize("phase", ["run_prelude", "run_block", "run_coda"])
def test_an_interrupted_generate_frees_everything(
    monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    llm = engine_of()
    for when in range(1, 12, 3):
        original, calls = getattr(llm.runner, phase), itertools.count()

        def interrupt(*args: Any, o=original, c=calls, w=when) -> Any:
            if next(c) == w:
                raise KeyboardInterrupt
            return o(*args)

        with monkeypatch.context() as patch:
            patch.setattr(llm.runner, phase, interrupt)
            with pytest.raises(KeyboardInterrupt):
                llm.generate([[1, 2, 3], [4] * 20, [5]], SAMPLED)
        check_empty(llm)
    (done,) = llm.generate([[5, 7]], GREEDY)
    check_same(done, generate(shared_model("expert"), [[5, 7]], GREEDY)[0])


def test_a_stream_gives_every_token_and_then_the_completion() -> None:
    llm = engine_of()
    (want,) = generate(shared_model("expert"), [[5, 7]], SAMPLED)
    events = list(llm.stream([5, 7], SAMPLED))
    assert [e.token_id for e in events] == want.token_ids
    assert [e.recursion_count for e in events] == want.recursion_counts
    assert [e.finish_reason for e in events] == [None] * 11 + ["length"]
    assert [e.completions is None for e in events] == [True] * 11 + [False]
    assert events[-1].completions is not None
    check_same(events[-1].completions[0], want)
    check_empty(llm)


def test_a_stream_that_is_closed_early_frees_everything() -> None:
    llm = engine_of()
    for taken in range(1, 5):
        stream = llm.stream([1, 2, 3, 4, 5, 6], SAMPLED)
        assert len(list(itertools.islice(stream, taken))) == taken
        assert llm.has_unfinished_requests
        stream.close()  # type: ignore[attr-defined]
        check_empty(llm)
        assert not llm.output_processor._streams


def test_streams_side_by_side_lose_no_token() -> None:
    llm = engine_of()
    prompts = [[5, 7, 11, 13, 17, 19], [1], [8, 9]]
    wanted = generate(shared_model("expert"), prompts, GREEDY)
    found = list(zip(*(llm.stream(p, GREEDY) for p in prompts), strict=True))
    for want, events in zip(wanted, zip(*found, strict=True), strict=True):
        assert [event.token_id for event in events] == want.token_ids
    tokens = []
    for event in llm.stream(prompts[0], GREEDY):
        tokens.append(event.token_id)
        if len(tokens) == 3:
            (inner,) = llm.generate([prompts[1]], SamplingParams(max_tokens=20))
            assert inner.token_ids[:10] == wanted[1].token_ids
    assert tokens == wanted[0].token_ids
    check_empty(llm)
    assert not llm.output_processor._streams


def test_an_interruption_after_the_last_token_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = engine_of()
    (want,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3))
    process_token = llm.output_processor.process_token

    def interrupted(*args: Any) -> bool:
        if process_token(*args):
            raise KeyboardInterrupt
        return False

    llm.add_request([5, 6, 7], SamplingParams(max_tokens=3))
    monkeypatch.setattr(llm.output_processor, "process_token", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(iter(llm.step, None))  # until it is interrupted
    llm.check_integrity()
    (completion,) = llm.step()[-1].completions or []  # the last output is still told
    assert completion.token_ids == want.token_ids
    check_empty(llm)
