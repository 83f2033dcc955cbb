"""`/v1/completions` through OpenAI's own client: every option, streamed and not."""

from typing import Any

import openai
import pytest
from live_server import MODEL_LEN, NAME, LiveServer

from mor.engine.llm import LLM
from mor.model.sampling import Completion, SamplingParams

GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 12}


def reference(engine: LLM, prompt: Any, **fields: Any) -> list[Completion]:
    return engine.generate([prompt], SamplingParams(**{"max_tokens": 12, **fields}))


def streamed(client: openai.OpenAI, **body: Any) -> tuple[list[Any], dict[int, Any], Any]:
    """Chunks; text, token ids, counts, log-probabilities and finish reason by choice; usage."""
    chunks = list(client.completions.create(**body, stream=True))
    found: dict[int, Any] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts, ids, counts, scores, reasons = found.setdefault(
                choice.index, ([], [], [], [], [])
            )
            texts.append(choice.text)
            ids += choice.token_ids
            counts += choice.recursion_counts
            scores += choice.logprobs.token_logprobs if choice.logprobs else []
            reasons += [choice.finish_reason] if choice.finish_reason else []
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    return chunks, found, usages[0] if usages else None


def test_an_answer_is_what_the_engine_says(client: openai.OpenAI, engine: LLM) -> None:
    answer = client.completions.create(**GREEDY, prompt="the cat")
    (want,) = reference(engine, "the cat")
    (choice,) = answer.choices
    assert answer.object == "text_completion"
    assert answer.model == NAME
    assert answer.id.startswith("cmpl-")
    assert choice.text == want.text
    assert choice.token_ids == want.token_ids
    assert choice.recursion_counts == want.recursion_counts
    assert choice.finish_reason == want.finish_reason
    assert len(set(want.recursion_counts)) > 1, "the model routes"
    usage = answer.usage
    assert usage.prompt_tokens == len(want.prompt_token_ids)
    assert usage.completion_tokens == len(want.token_ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    mean = sum(want.recursion_counts) / len(want.recursion_counts)
    assert usage.mean_recursions == pytest.approx(mean, abs=1e-6)
    assert 0 < usage.flops_saved < 1


def test_a_stream_is_the_same_in_parts(client: openai.OpenAI, engine: LLM) -> None:
    body = {**GREEDY, "prompt": "the cat", "max_tokens": 40, "extra_body": {"ignore_eos": True}}
    chunks, found, usage = streamed(client, **body)
    (want,) = reference(engine, "the cat", max_tokens=40, ignore_eos=True)
    texts, ids, counts, _, reasons = found[0]
    assert "".join(texts) == want.text
    assert (ids, counts) == (want.token_ids, want.recursion_counts)
    assert reasons == ["length"]
    assert usage is None
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streams_usage_comes_last(client: openai.OpenAI) -> None:
    body = {**GREEDY, "prompt": "the cat"}
    whole = client.completions.create(**body)
    chunks, _, usage = streamed(client, **body, stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert usage == whole.usage


def test_several_prompts_and_several_completions(client: openai.OpenAI, engine: LLM) -> None:
    prompts = ["the cat", "the rat", "猫が"]
    body = {"model": NAME, "max_tokens": 9, "temperature": 1.0, "seed": 5, "n": 2}
    answer = client.completions.create(**body, prompt=prompts)
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=5, n=2)
    want = engine.generate(prompts, params)
    assert [c.index for c in answer.choices] == list(range(6))
    assert [c.text for c in answer.choices] == [c.text for c in want]
    assert [c.token_ids for c in answer.choices] == [c.token_ids for c in want]
    _, found, _ = streamed(client, **body, prompt=prompts)
    assert ["".join(found[i][0]) for i in range(6)] == [c.text for c in want]
    assert [found[i][2] for i in range(6)] == [c.recursion_counts for c in want]


@pytest.mark.parametrize("kind", ["ids", "lists"])
def test_token_ids_are_prompts(client: openai.OpenAI, engine: LLM, kind: str) -> None:
    ids = engine.tokenizer.encode("the mat, the cat")
    given: Any = ids if kind == "ids" else [ids, ids[:3]]
    answer = client.completions.create(**GREEDY, prompt=given)
    want = engine.generate([ids] if kind == "ids" else given, SamplingParams(max_tokens=12))
    assert [c.text for c in answer.choices] == [c.text for c in want]


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.7, "seed": 3, "top_p": 0.9},
    {"temperature": 1.3, "seed": 3, "top_k": 5, "min_p": 0.05},
    {"temperature": 1.0, "seed": 0, "top_k": -1},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 2.0, "repetition_penalty": 1.3},
    {"ignore_eos": True, "max_tokens": 60},
    {"min_tokens": 12, "stop_token_ids": [5, 6, 7, 8]},
    {"max_recursions": 1},
    {"max_recursions": 2},
    {"min_recursions": 3},
    {"min_recursions": 2, "max_recursions": 2},
]
EXTRA = frozenset(
    (
        *("top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens", "stop_token_ids"),
        *("max_recursions", "min_recursions"),
    )
)


@pytest.mark.parametrize("fields", OPTIONS, ids=lambda f: "-".join(f))
def test_options_reach_the_engine(
    client: openai.OpenAI, engine: LLM, fields: dict[str, Any]
) -> None:
    plain = {k: v for k, v in fields.items() if k not in EXTRA}
    extra = {k: v for k, v in fields.items() if k in EXTRA}
    body = {**GREEDY, **plain, "prompt": "the cat sat"}
    (choice,) = client.completions.create(**body, extra_body=extra).choices
    named = dict(fields)
    if named.get("top_k") == -1:
        named["top_k"] = 0
    (want,) = reference(engine, "the cat sat", **named)
    assert (choice.text, choice.token_ids) == (want.text, want.token_ids)
    assert choice.recursion_counts == want.recursion_counts


def test_recursion_limits_show_in_counts_and_flops(client: openai.OpenAI) -> None:
    body = {**GREEDY, "prompt": "the cat sat on", "max_tokens": 20}

    def ask(**extra: int) -> Any:
        return client.completions.create(**body, extra_body=extra)

    full, minimum = ask(min_recursions=3), ask(max_recursions=1, min_recursions=1)
    assert set(full.choices[0].recursion_counts) == {3}
    assert set(minimum.choices[0].recursion_counts) == {1}
    assert full.usage.flops_saved == 0
    assert full.usage.mean_recursions == 3
    assert minimum.usage.flops_saved > ask(max_recursions=2).usage.flops_saved > 0


def test_a_stop_text_ends_the_answer(client: openai.OpenAI, engine: LLM) -> None:
    (free,) = reference(engine, "the cat", max_tokens=40, ignore_eos=True)
    stop = free.text[7:9]
    extra = {"ignore_eos": True}
    body = {**GREEDY, "prompt": "the cat", "max_tokens": 40, "extra_body": extra}
    for given in (stop, ["never there", stop]):
        (choice,) = client.completions.create(**body, stop=given).choices
        assert choice.text == free.text[: free.text.index(stop)]
        assert choice.finish_reason == "stop"
        _, found, _ = streamed(client, **body, stop=given)
        assert "".join(found[0][0]) == choice.text
        assert found[0][4] == ["stop"]


def test_logprobs_are_the_models(client: openai.OpenAI, engine: LLM) -> None:
    body = {**GREEDY, "prompt": "the cat", "logprobs": 3}
    (choice,) = client.completions.create(**body).choices
    (want,) = reference(engine, "the cat", logprobs=3)
    scores = choice.logprobs
    assert scores.token_logprobs == pytest.approx(want.logprobs, abs=1e-9)
    for top, expected, chosen in zip(
        scores.top_logprobs, want.top_logprobs, want.logprobs, strict=True
    ):
        assert max(top.values()) == pytest.approx(max(expected.values()), abs=1e-9)
        assert chosen == pytest.approx(max(top.values()), abs=1e-9), "greedy takes the likeliest"
        assert len(top) <= 3
    texts = [t for t in scores.tokens if not t.startswith("bytes:")]
    assert texts
    assert all(t in want.text or t == "<|endoftext|>" for t in texts)
    offsets = scores.text_offset
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    _, found, _ = streamed(client, **body)
    assert found[0][3] == pytest.approx(want.logprobs, abs=1e-9)
    (none,) = client.completions.create(**{**body, "logprobs": 0}).choices
    assert [len(top) for top in none.logprobs.top_logprobs] == [1] * len(want.token_ids)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_batched_token_ids(client: openai.OpenAI, engine: LLM, max_tokens: int) -> None:
    """As lm-eval asks."""
    prompts = [engine.tokenizer.encode(text) for text in ("the cat sat on the mat", "猫が座った")]
    body = {"model": NAME, "temperature": 0, "logprobs": 1, "seed": 1234, "echo": True}
    answer = client.completions.create(**body, prompt=prompts, max_tokens=max_tokens)
    params = SamplingParams(max_tokens=1, logprobs=1, prompt_logprobs=True)
    for choice, want in zip(answer.choices, engine.generate(prompts, params), strict=True):
        scores = choice.logprobs
        assert scores.token_logprobs[0] is None
        assert scores.top_logprobs[0] is None
        expected = [*want.prompt_logprobs[1:], *want.logprobs[:max_tokens]]
        assert scores.token_logprobs[1:] == pytest.approx(expected, abs=1e-9)
        tops = [*want.prompt_top_logprobs[1:], *want.top_logprobs[:max_tokens]]
        for got, top in zip(scores.top_logprobs[1:], tops, strict=True):
            assert max(got.values()) == pytest.approx(max(top.values()), abs=1e-9)
        assert (
            choice.text == engine.tokenizer.decode(want.prompt_token_ids) + want.text * max_tokens
        )
        assert choice.token_ids == want.token_ids[:max_tokens]
        assert choice.prompt_token_ids == want.prompt_token_ids
        assert choice.prompt_recursion_counts == want.prompt_recursion_counts
    assert answer.usage.completion_tokens == 2 * max_tokens


def test_a_streams_echo_comes_first(client: openai.OpenAI) -> None:
    body = {**GREEDY, "prompt": "the cat", "echo": True, "logprobs": 1}
    (whole,) = client.completions.create(**body).choices
    chunks, found, _ = streamed(client, **body)
    assert "".join(found[0][0]) == whole.text
    assert whole.text.startswith("the cat")
    assert found[0][3] == whole.logprobs.token_logprobs
    assert chunks[0].choices[0].prompt_token_ids == whole.prompt_token_ids


def test_an_empty_prompt_starts_from_nothing(client: openai.OpenAI, engine: LLM) -> None:
    (choice,) = client.completions.create(**GREEDY, prompt="").choices
    (want,) = reference(engine, [engine.tokenizer.eos_id])
    assert choice.token_ids == want.token_ids


def test_without_max_tokens_the_models_length_is_the_end(server: LiveServer) -> None:
    body = {"prompt": "the cat", "max_tokens": None, "temperature": 0, "ignore_eos": True}
    answer = server.post("/v1/completions", **body).json()
    assert answer["usage"]["total_tokens"] == MODEL_LEN
    (choice,) = server.post("/v1/completions", prompt="the cat", ignore_eos=True).json()["choices"]
    assert len(choice["token_ids"]) == 16, "OpenAI's default"
