"""Sampling fields of the API against `SamplingParams`: names, defaults and ranges agree."""

from dataclasses import asdict, fields

import pytest
from pydantic import ValidationError

from mor.model.sampling import SamplingParams
from mor.serve.openai.protocol import ChatRequest, CompletionRequest, SamplingRequest
from mor.validation import range_of

ELSEWHERE = {  # of the routes' own: see CompletionRequest and ChatRequest
    "max_tokens",
    "logprobs",
    "prompt_logprobs",
    "prompt_logprobs_from",
}
OTHER_DEFAULTS = {"temperature": 1.0, "stop": None, "stop_token_ids": []}
OTHER_BOUNDS = {  # what the API narrows, and -1 for top_k, which clients of vLLM send
    "n": {"le": 128},
    "top_k": {"ge": -1, "lt": 2**31},
    "min_tokens": {"lt": 2**31},
    "min_recursions": {"lt": 2**31},
    "max_recursions": {"lt": 2**31},
}
SHARED = [f for f in fields(SamplingParams) if f.name not in ELSEWHERE]


def test_every_sampling_field_can_be_sent() -> None:
    own = {"model", "stream", "stream_options"}
    assert {f.name for f in SHARED} | own == set(SamplingRequest.model_fields)
    for request in (CompletionRequest, ChatRequest):
        assert {"max_tokens", "logprobs"} < set(request.model_fields)


@pytest.mark.parametrize("name", [f.name for f in SHARED])
def test_defaults_are_those_of_sampling_params(name: str) -> None:
    expected = OTHER_DEFAULTS.get(name, getattr(SamplingParams(), name))
    assert SamplingRequest.model_fields[name].default == expected


@pytest.mark.parametrize("name", [f.name for f in SHARED])
def test_ranges_are_those_of_sampling_params(name: str) -> None:
    bounds = asdict(range_of(SamplingParams, name)) | OTHER_BOUNDS.get(name, {})
    names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    expected = {names[key]: bound for key, bound in bounds.items() if bound is not None}
    shown = SamplingRequest.model_json_schema()["properties"][name]
    shown = shown.get("anyOf", [shown])[0]  # of `X | None` the first
    assert {key: shown[key] for key in names.values() if key in shown} == expected


def test_a_number_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(ValidationError, match="finite"):
        SamplingRequest(temperature=float("inf"))
