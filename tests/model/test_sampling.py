"""Sampling parameters: what is refused, and what each does to a distribution made by hand."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

import mor
from mor.errors import RequestError
from mor.model.generation import likeliest, pick
from mor.model.sampling import SamplingParams, check_request
from tiny import tiny_config

PROBS = (0.15, 0.5, 0.05, 0.3)
LOGITS = torch.tensor(PROBS, dtype=torch.float64).log()
GRID = 500


def shares(
    logits: torch.Tensor = LOGITS, *, history: Any = None, **fields: Any
) -> dict[int, float]:
    """Which tokens come, and how often, over an even grid of random numbers."""
    params = SamplingParams(**{"temperature": 1.0, **fields})
    drawn = Counter(pick(logits, params, (i + 0.5) / GRID, **(history or {})) for i in range(GRID))
    return {token: drawn[token] / GRID for token in sorted(drawn)}


def close(expected: dict[int, float]) -> Any:
    return pytest.approx(expected, abs=1 / GRID)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "an integer >= 1"),
    ({"max_tokens": 1.0}, "an integer"),
    ({"max_tokens": True}, "an integer"),
    ({"max_tokens": None}, "an integer"),
    ({"min_tokens": -1}, "an integer >= 0"),
    ({"min_tokens": 5, "max_tokens": 4}, "at most max_tokens=4"),
    ({"temperature": -1}, "a finite number >= 0"),
    ({"temperature": "hot"}, "a finite number"),
    ({"temperature": math.nan}, "a finite number"),
    ({"temperature": math.inf}, "a finite number"),
    ({"temperature": 10**400}, "a finite number"),
    ({"top_k": -1}, "an integer >= 0"),
    ({"top_k": 2.5}, "an integer"),
    ({"top_p": 0}, r"in \(0, 1\]"),
    ({"top_p": 1.1}, r"in \(0, 1\]"),
    ({"top_p": False}, "a finite number"),
    ({"min_p": -0.1}, r"in \[0, 1\]"),
    ({"min_p": 1.1}, r"in \[0, 1\]"),
    ({"repetition_penalty": 0}, r"in \[0.01, 100\]"),
    ({"repetition_penalty": None}, "a finite number"),
    ({"presence_penalty": 2.1}, r"in \[-2, 2\]"),
    ({"frequency_penalty": -2.1}, r"in \[-2, 2\]"),
    ({"seed": -1}, r"an integer in 0\.\.9223372036854775807"),
    ({"seed": 2**63}, r"an integer in 0\.\."),
    ({"seed": 0.5}, "an integer"),
    ({"n": 0}, r"in 1\.\.1024"),
    ({"n": None}, "an integer"),
    ({"stop": ""}, "none of them empty"),
    ({"stop": ["a", ""]}, "none of them empty"),
    ({"stop": [1]}, "a text or a list of texts"),
    ({"stop": None}, "a text or a list of texts"),
    ({"stop_token_ids": [1.0]}, "a list of token ids"),
    ({"stop_token_ids": [True]}, "a list of token ids"),
    ({"stop_token_ids": [-1]}, "a list of token ids"),
    ({"stop_token_ids": 3}, "a list of token ids"),
    ({"ignore_eos": 1}, "true or false"),
    ({"logprobs": 21}, r"in 0\.\.20"),
    ({"logprobs": -1}, r"in 0\.\.20"),
    ({"logprobs": True}, "an integer"),
    ({"prompt_logprobs": 1}, "true or false"),
    ({"prompt_logprobs_from": 2}, "1 without prompt_logprobs"),
    ({"prompt_logprobs_from": 0, "prompt_logprobs": True}, "an integer >= 1"),
    ({"min_recursions": 0}, "an integer >= 1"),
    ({"max_recursions": 0}, "an integer >= 1"),
    ({"max_recursions": 1, "min_recursions": 2}, "at least min_recursions=2"),
]


@pytest.mark.parametrize(("bad", "words"), BAD)
def test_bad_values_are_named_in_one_sentence(bad: dict[str, Any], words: str) -> None:
    name = next(iter(bad))
    with pytest.raises(RequestError, match=f"^{name}=.* must be .*{words}") as caught:
        SamplingParams(**bad)
    assert "\n" not in str(caught.value)


def test_values_are_brought_into_one_form() -> None:
    params = SamplingParams(
        temperature=1,
        stop=["a", "b"],
        stop_token_ids=[3, 4],
        min_recursions=2,
        max_recursions=2,
    )
    assert isinstance(params.temperature, float)
    assert params.stop == ("a", "b")
    assert params.stop_token_ids == (3, 4)
    assert SamplingParams(stop="end").stop == ("end",)
    assert hash(params) == hash(SamplingParams(**vars(params)))
    assert mor.SamplingParams is SamplingParams


def test_without_cuts_tokens_come_as_often_as_their_probability() -> None:
    assert shares() == close(dict(enumerate(PROBS)))


def test_the_token_is_the_first_whose_sum_exceeds_the_random_number() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0, 0.0, 0.0, -math.inf], dtype=torch.float64)
    params = SamplingParams(temperature=1.0)
    below = math.nextafter(1, 0)
    drawn = [pick(logits, params, u) for u in (0.0, 0.2499, 0.25, 0.5, 0.75, below)]
    assert drawn == [0, 0, 2, 3, 4, 4]


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    params = SamplingParams(top_k=3, top_p=0.1, min_p=0.9)
    assert pick(LOGITS, params, 0.99) == 1
    assert pick(torch.tensor([0.0, 2.0, 2.0]), params, 0.99) == 1


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature(temperature: float) -> None:
    powers = [p ** (1 / temperature) for p in PROBS]
    expected = {i: p / sum(powers) for i, p in enumerate(powers)}
    assert shares(temperature=temperature) == close(expected)


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert shares(LOGITS * 100, temperature=temperature) == {1: 1.0}


def test_a_huge_temperature_is_uniform() -> None:
    assert shares(temperature=1e300) == close(dict.fromkeys(range(4), 0.25))


def test_top_k() -> None:
    assert shares(top_k=1) == {1: 1.0}
    assert shares(top_k=2) == close({1: 5 / 8, 3: 3 / 8})
    assert shares(top_k=4) == shares(top_k=99) == shares()
    tied = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    assert set(shares(tied, top_k=2)) == {1, 3, 4}, "equals stay together"


def test_top_p() -> None:
    assert shares(top_p=1e-9) == {1: 1.0}
    assert shares(top_p=0.7) == close({1: 5 / 8, 3: 3 / 8})
    assert set(shares(top_p=0.81)) == {0, 1, 3}
    assert shares(top_p=0.999) == shares()


def test_min_p() -> None:
    assert shares(min_p=0.09) == shares()
    assert set(shares(min_p=0.11)) == {0, 1, 3}
    assert shares(min_p=0.31) == close({1: 5 / 8, 3: 3 / 8})
    assert shares(min_p=1.0) == {1: 1.0}
    # After the temperature: at 0.5 token 3 has 9/25 of the likeliest one's probability.
    assert set(shares(min_p=0.35, temperature=0.5)) == {1, 3}
    assert set(shares(min_p=0.37, temperature=0.5)) == {1}


def test_top_p_counts_what_top_k_left() -> None:
    assert set(shares(top_p=0.6)) == {1, 3}
    assert set(shares(top_p=0.6, top_k=2)) == {1}  # of 0.8 that are left, 0.5 is more than 0.6


def test_repetition_penalty_divides_what_is_positive_and_multiplies_the_rest() -> None:
    logits = torch.tensor([2.0, -1.0, 1.5, 0.0], dtype=torch.float64)
    seen = {"prompt": [0, 0], "output": [1, 3, 3]}
    expected = torch.tensor([1.0, -2.0, 1.5, 0.0], dtype=torch.float64).softmax(0).tolist()
    found = shares(logits, history=seen, repetition_penalty=2)
    assert found == close(dict(enumerate(expected)))
    params = SamplingParams(repetition_penalty=2.0)
    assert pick(logits, params, 0.0, **seen) == 2
    assert logits.tolist() == [2.0, -1.0, 1.5, 0.0], "the logits are the caller's"


def test_presence_and_frequency_look_at_the_output_alone() -> None:
    seen = {"prompt": [1, 1], "output": [3, 0, 3]}
    less = [1.5 + 0.25, 0, 0, 1.5 + 2 * 0.25]
    weights = [p * math.exp(-x) for p, x in zip(PROBS, less, strict=True)]
    found = shares(history=seen, presence_penalty=1.5, frequency_penalty=0.25)
    assert found == close({i: w / sum(weights) for i, w in enumerate(weights)})
    negative = SamplingParams(presence_penalty=-2.0)
    assert pick(LOGITS, negative, 0.0, output=[3]) == 3


def test_penalties_come_in_the_order_of_vllm() -> None:
    logits = torch.tensor([3.0, 1.9], dtype=torch.float64)
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.05)
    assert pick(logits, params, 0.0, output=[0]) == 0  # 3 / 1.5 - 0.05 = 1.95
    assert pick(logits, params, 0.0, output=[0, 0, 0]) == 1  # 1.85


def test_forbidden_tokens_do_not_come() -> None:
    assert pick(LOGITS, SamplingParams(), 0.0, forbidden=[1]) == 3
    assert shares(history={"forbidden": [1, 0]}) == close({2: 1 / 7, 3: 6 / 7})


def test_what_ends_a_request() -> None:
    params = SamplingParams(stop_token_ids=(7, 5), min_tokens=2)
    assert params.end_ids(None) == {5, 7}
    assert params.end_ids(3) == {3, 5, 7}
    assert SamplingParams(ignore_eos=True).end_ids(3) == frozenset()
    assert [list(params.forbidden_ids(3, n)) for n in range(3)] == [[3, 5, 7], [3, 5, 7], []]


def test_random_numbers_are_the_seeds() -> None:
    def first(seed: int | None, index: int) -> float:
        return SamplingParams(seed=seed).random_numbers(index).random()

    assert first(5, 0) == first(5, 0)
    assert first(5, 2) == first(7, 0)
    assert len({first(5, 0), first(5, 1), first(None, 0), first(None, 0)}) == 4


def test_recursion_range() -> None:
    assert SamplingParams().recursion_range(3) == (0, 3)
    assert SamplingParams(min_recursions=2, max_recursions=2).recursion_range(3) == (2, 2)
    assert SamplingParams(max_recursions=2).recursion_range(3) == (0, 2)
    assert SamplingParams(min_recursions=1, max_recursions=2).recursion_range(3) == (1, 2)


def test_likeliest_are_in_order_and_the_lower_id_goes_first() -> None:
    found = likeliest(torch.tensor([-2.0, -1.0, -3.0, -1.0, -1.0]), 4)
    assert list(found.items()) == [(1, -1.0), (3, -1.0), (4, -1.0), (0, -2.0)]


def test_sequence_sharing_cannot_stop_early() -> None:
    config = tiny_config("sequence")
    check_request(config, [1], SamplingParams(min_recursions=2, max_recursions=2))
    for fields in ({"min_recursions": 1}, {"max_recursions": 1}):
        with pytest.raises(RequestError, match=r"p: (min|max)_recursions=1 needs sharing='cycle'"):
            check_request(config, [1], SamplingParams(**fields), "p")
