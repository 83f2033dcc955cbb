"""`/v1/chat/completions` through OpenAI's own client."""

from typing import Any

import openai
import pytest
from live_server import MODEL_LEN, NAME, LiveServer

from mor.engine.llm import LLM
from mor.model.sampling import Completion, SamplingParams

MESSAGES: list[Any] = [
    {"role": "system", "content": "the cat"},
    {"role": "user", "content": [{"type": "text", "text": " the rat "}]},
]
RENDERED = ("system: the cat", "user: the rat", "assistant: ")
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_completion_tokens": 12}


def prompt_ids(engine: LLM) -> list[int]:
    """The conversation as the template writes it: turns, each ended by the special token."""
    tokenizer = engine.tokenizer
    first, second, third = map(tokenizer.encode, RENDERED)
    return [*first, tokenizer.eos_id, *second, tokenizer.eos_id, *third]


def reference(engine: LLM, **fields: Any) -> list[Completion]:
    return engine.generate([prompt_ids(engine)], SamplingParams(**{"max_tokens": 12, **fields}))


def test_an_answer_is_what_the_engine_says(client: openai.OpenAI, engine: LLM) -> None:
    answer = client.chat.completions.create(**GREEDY, messages=MESSAGES)
    (want,) = reference(engine)
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant"
    assert choice.message.content == want.text
    assert (choice.token_ids, choice.recursion_counts) == (want.token_ids, want.recursion_counts)
    assert choice.finish_reason == want.finish_reason
    assert choice.logprobs is None
    assert answer.usage.prompt_tokens == len(want.prompt_token_ids)
    assert 0 < answer.usage.flops_saved < 1


def test_a_stream_is_the_same_in_parts(client: openai.OpenAI, engine: LLM) -> None:
    body = {**GREEDY, "messages": MESSAGES, "temperature": 1.0, "seed": 4, "n": 2}
    body["stream_options"] = {"include_usage": True}
    chunks = list(client.chat.completions.create(**body, stream=True))
    want = reference(engine, temperature=1.0, seed=4, n=2)
    for number, one in enumerate(want):
        parts = [c for chunk in chunks for c in chunk.choices if c.index == number]
        assert parts[0].delta.role == "assistant"
        assert [part.delta.role for part in parts[1:]] == [None] * (len(parts) - 1)
        assert "".join(part.delta.content for part in parts) == one.text
        assert [t for part in parts for t in part.token_ids] == one.token_ids
        assert [c for part in parts for c in part.recursion_counts] == one.recursion_counts
        assert [p.finish_reason for p in parts if p.finish_reason] == [one.finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == sum(len(c.token_ids) for c in want)


def test_logprobs_are_the_models(client: openai.OpenAI, engine: LLM) -> None:
    body = {**GREEDY, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    (choice,) = client.chat.completions.create(**body).choices
    (want,) = reference(engine, logprobs=2)
    content = choice.logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx(want.logprobs, abs=1e-9)
    for entry, token, top in zip(content, want.token_ids, want.top_logprobs, strict=True):
        assert bytes(entry.bytes) == engine.tokenizer.token_bytes(token)
        got = [(bytes(t.bytes), t.logprob) for t in entry.top_logprobs]
        expected = [(engine.tokenizer.token_bytes(t), score) for t, score in top.items()]
        assert [data for data, _ in got] == [data for data, _ in expected]
        scores = [score for _, score in expected]
        assert [score for _, score in got] == pytest.approx(scores, abs=1e-9)
    assert b"".join(bytes(e.bytes) for e in content).decode("utf-8", "replace") == want.text
    streamed = [
        entry
        for chunk in client.chat.completions.create(**body, stream=True)
        for part in chunk.choices
        if part.logprobs
        for entry in part.logprobs.content
    ]
    assert [entry.logprob for entry in streamed] == [entry.logprob for entry in content]


def test_old_and_new_names_of_the_limit(client: openai.OpenAI, server: LiveServer) -> None:
    asked = {"model": NAME, "messages": MESSAGES, "extra_body": {"ignore_eos": True}}
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(**asked, **{name: 7})
        assert answer.usage.completion_tokens == 7
    with pytest.raises(openai.BadRequestError, match="give one"):
        client.chat.completions.create(**asked, max_tokens=7, max_completion_tokens=7)
    free = server.post("/v1/chat/completions", messages=MESSAGES, ignore_eos=True).json()
    assert free["usage"]["total_tokens"] == MODEL_LEN


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"top_logprobs": 2}, "top_logprobs needs logprobs=true"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "developer", "content": "x"}]}, "no developers"),
        ({"tools": []}, "tools is not a field"),
        ({"response_format": {"type": "text"}}, "response_format is not a field"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_served_is_refused(
    client: openai.OpenAI, fields: dict[str, Any], match: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=match):
        client.chat.completions.create(**{**GREEDY, "messages": MESSAGES, **fields})
