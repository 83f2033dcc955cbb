"""What cannot be served: the right status, OpenAI's shape, the field's name, nothing ignored."""

import json
from typing import Any

import openai
import pytest
from live_server import MODEL_LEN, NAME, LiveServer

LIMITS = {"temperature": -1, "top_p": 0, "n": 0, "logprobs": 21, "seed": -1, "top_k": -2}


def error(answer: Any, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    return body["error"]


@pytest.mark.parametrize("field", ["best_of", "suffix", "logit_bias", "user", "no_such_field"])
def test_an_unsupported_field_is_named(server: LiveServer, field: str) -> None:
    said = error(server.post("/v1/completions", prompt="x", **{field: None}))
    assert said["param"] == field
    assert said["code"] == "unsupported_field"
    assert said["type"] == "invalid_request_error"
    assert field in said["message"]


@pytest.mark.parametrize("field", LIMITS)
def test_a_value_out_of_range_is_named(server: LiveServer, field: str) -> None:
    said = error(server.post("/v1/completions", prompt="x", **{field: LIMITS[field]}))
    assert said["param"] == field
    assert field in said["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, None),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [10**9]}, None),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 5.0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 10**30}, "max_tokens"),
        ({"prompt": "x", "stream": 1}, "stream"),
        ({"prompt": "x", "stop": [""]}, None),
        ({"prompt": "x", "stop": ["a"] * 100}, "stop"),
        ({"prompt": "x", "min_tokens": 99}, None),
        ({"prompt": "x", "max_recursions": 4}, None),
        ({"prompt": "x", "min_recursions": 0}, "min_recursions"),
        ({"prompt": "x", "min_recursions": 3, "max_recursions": 2}, None),
        ({"prompt": "x", "stop_token_ids": [5000]}, None),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, None),
        ({"prompt": "x", "stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"prompt": "\ud800"}, None),
        ({"prompt": "x", "\ud800": 1}, None),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_a_body_that_cannot_be_served(
    server: LiveServer, body: dict[str, Any], param: str | None
) -> None:
    answer = server.http.post(
        "/v1/completions",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert error(answer)["param"] == param


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_numbers_that_are_none(server: LiveServer, number: str) -> None:
    answer = server.http.post(
        "/v1/completions",
        content=f'{{"prompt": "x", "temperature": {number}}}',
        headers={"content-type": "application/json"},
    )
    assert error(answer)["param"] == "temperature"


def test_a_prompt_that_is_too_long(client: openai.OpenAI, server: LiveServer) -> None:
    for prompt in ("the cat " * MODEL_LEN, "x" * 10**6, [1] * MODEL_LEN):
        with pytest.raises(openai.BadRequestError, match="shorten the prompt") as caught:
            client.completions.create(model=NAME, prompt=prompt)
        assert caught.value.code == "context_length_exceeded"
    said = error(server.post("/v1/completions", prompt="x", max_tokens=MODEL_LEN))
    assert said["code"] == "context_length_exceeded"


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'other' is not served") as caught:
        client.completions.create(model="other", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_routes_and_methods_that_are_not_there(server: LiveServer) -> None:
    assert "/nowhere" in error(server.http.get("/nowhere"), 404)["message"]
    answer = server.http.get("/v1/completions")
    assert error(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_more_completions_than_can_ever_wait(server: LiveServer) -> None:
    said = error(server.post("/v1/completions", prompt=["x"] * 100, n=100))
    assert "send fewer prompts" in said["message"]


def test_only_json_is_read(server: LiveServer) -> None:
    body = b'{"prompt": "x"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = server.http.post("/v1/completions", content=body, headers={"content-type": kind})
        assert error(answer)["type"] == "invalid_request_error"
