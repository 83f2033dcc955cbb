"""Models, tokens, health, metrics, depths: what the server says of itself."""

from typing import Any

import openai
import pytest
from live_server import MODEL_LEN, NAME, LiveServer

import mor
from mor.engine.llm import LLM

TEXT = "the cat; naïve 猫😀"


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.max_model_len, card.num_recursions) == (NAME, MODEL_LEN, 3)
    assert client.models.retrieve(NAME) == card


def test_texts_and_tokens(server: LiveServer, engine: LLM) -> None:
    said = server.post("/tokenize", prompt=TEXT, return_token_strs=True).json()
    assert said["tokens"] == engine.tokenizer.encode(TEXT)
    assert said["count"] == len(said["tokens"]) == len(said["token_strs"])
    assert said["max_model_len"] == MODEL_LEN
    assert server.post("/detokenize", tokens=said["tokens"]).json() == {"prompt": TEXT}
    plain = server.post("/tokenize", model=NAME, prompt="").json()
    assert plain == {"count": 0, "max_model_len": MODEL_LEN, "tokens": []}


@pytest.mark.parametrize(
    ("path", "body", "match"),
    [
        ("/tokenize", {}, "give prompt or messages"),
        ("/tokenize", {"prompt": "x", "messages": []}, "messages"),
        ("/tokenize", {"prompt": "x", "model": "other"}, "other"),
        ("/detokenize", {"tokens": [300]}, "300 is not a token id"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ],
)
def test_tokens_that_are_none(
    server: LiveServer, path: str, body: dict[str, Any], match: str
) -> None:
    answer = server.post(path, **body)
    assert answer.status_code in (400, 404)
    assert match in answer.json()["error"]["message"]


def test_version(server: LiveServer) -> None:
    assert server.get("/version") == {"version": mor.__version__}


def test_depths_and_metrics_follow_the_requests(server: LiveServer) -> None:
    server.idle()
    before = server.get("/depths")
    numbers = ("mor:prompt_tokens_total", "mor:generation_tokens_total")
    counted = [server.metric(name) for name in numbers]
    answer = server.post("/v1/completions", prompt=TEXT, max_tokens=20, ignore_eos=True).json()
    after = server.idle()
    counts = answer["choices"][0]["recursion_counts"]
    grown = [
        b - a for a, b in zip(before["tokens_by_depth"], after["tokens_by_depth"], strict=True)
    ]
    assert grown == [counts.count(number) for number in range(4)]
    assert after["model"] == NAME
    assert after["num_recursions"] == 3
    assert after["kv_pages_by_depth"] == [0, 0, 0]
    assert after["kv_pages_used"] == after["kv_pages_cached"]
    assert after["tokens_per_s"] > 0
    usage = answer["usage"]
    new = [server.metric(name) - number for name, number in zip(numbers, counted, strict=True)]
    assert new == [usage["prompt_tokens"], usage["completion_tokens"]]
    for name in (
        *("time_to_first_token_seconds", "inter_token_latency_seconds"),
        *("e2e_request_latency_seconds", "request_queue_time_seconds"),
        *("request_prefill_time_seconds", "request_decode_time_seconds"),
        *("request_prompt_tokens", "request_generation_tokens", "token_recursion_depth"),
    ):
        assert server.metric(f"mor:{name}_count") > 0, name
    assert server.metric("mor:request_success_total", finished_reason="length") > 0
    assert server.metric("mor:num_requests_running") == 0
    assert server.metric("mor:num_requests_waiting") == 0
    assert 0 <= server.metric("mor:kv_cache_usage_perc") <= 1
    assert server.metric("mor:kv_cache_bytes", depth="0") == 0
    assert server.metric("mor:token_recursion_depth_bucket", le="3.0") == sum(
        after["tokens_by_depth"]
    )


def test_a_repeated_prompt_is_not_computed_again(server: LiveServer) -> None:
    text = "the mat the rat " * 10
    server.post("/v1/completions", prompt=text, max_tokens=1)
    before = server.metric("mor:prefix_cache_hits_total")
    server.post("/v1/completions", prompt=text, max_tokens=1)
    server.idle()
    assert server.metric("mor:prefix_cache_hits_total") > before
