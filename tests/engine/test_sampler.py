"""The batched sampler makes the reference generator's choices, row by row, in any company."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor.engine.plan import SamplerOutput, SamplingInput
from mor.engine.sampler import sample
from mor.model.generation import likeliest, pick
from mor.model.sampling import SamplingParams

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    """Each field is off in half of the cases."""
    choices: dict[str, st.SearchStrategy[Any]] = {
        "temperature": st.floats(0.05, 5),
        "top_k": st.integers(1, 50),
        "top_p": st.floats(0.01, 0.999),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0.5, 2),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logprobs": st.integers(0, 20),
    }
    return SamplingParams(**{k: draw(v) for k, v in choices.items() if draw(st.booleans())})


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, list[SamplingInput]]:
    """Logits, often with equals among them, and what each row asks for."""
    size = draw(st.integers(2, 40))
    ids = st.lists(st.integers(0, size - 1), max_size=8)
    rows = [
        SamplingInput(
            params=draw(sampling_params()),
            uniform=draw(st.floats(0, 1, exclude_max=True)),
            prompt=draw(ids),
            output=draw(ids),
            forbidden=draw(st.lists(st.integers(0, size - 1), max_size=size // 2)),
        )
        for _ in range(draw(st.integers(1, 6)))
    ]
    source = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    logits = 3 * torch.randn(len(rows), size, generator=source, dtype=torch.float64)
    logits = logits.round() if draw(st.booleans()) else logits
    return logits.to(draw(st.sampled_from(DTYPES))), rows


def check_rows(logits: torch.Tensor, rows: list[SamplingInput]) -> None:
    found = sample(logits, rows)
    assert len(found.token_ids) == len(found.logprobs) == len(found.top_logprobs) == len(rows)
    exact = logits.dtype == torch.float64
    for number, (line, row) in enumerate(zip(logits, rows, strict=True)):
        history = {"prompt": row.prompt, "output": row.output, "forbidden": row.forbidden}
        assert found.token_ids[number] == pick(line, row.params, row.uniform, **history)
        logprobs = line.double().log_softmax(-1)
        near = pytest.approx(float(logprobs[found.token_ids[number]]), abs=1e-12 if exact else 1e-5)
        assert found.logprobs[number] == near
        top = likeliest(logprobs, row.params.logprobs or 0)
        assert list(found.top_logprobs[number].values()) == pytest.approx(
            list(top.values()), abs=1e-12 if exact else 1e-5
        )
        if len(logprobs) <= 20 or len(set(line.tolist())) == len(line):
            assert list(found.top_logprobs[number]) == list(top)


def entry(found: SamplerOutput, number: int) -> tuple[int, float, list[tuple[int, float]]]:
    top = list(found.top_logprobs[number].items())
    return found.token_ids[number], found.logprobs[number], top


@given(batch=batches())
def test_choices_are_the_reference_generators(
    batch: tuple[torch.Tensor, list[SamplingInput]],
) -> None:
    check_rows(*batch)


@given(batch=batches())
def test_neighbours_do_not_matter(batch: tuple[torch.Tensor, list[SamplingInput]]) -> None:
    logits, rows = batch
    together = sample(logits, rows)
    for number, row in enumerate(rows):
        alone = sample(logits[number : number + 1], [row])
        assert entry(alone, 0) == entry(together, number)


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_a_large_vocabulary(scale: float) -> None:
    """More tokens than top_p looks at first; when they are alike, it needs most of them."""
    size, source = 4000, torch.Generator().manual_seed(1)
    logits = scale * torch.randn(4, size, generator=source, dtype=torch.float64)
    asked: list[dict[str, Any]] = [
        {"top_p": 0.95},
        {"top_p": 0.1, "min_p": 0.01},
        {"top_k": 1500, "top_p": 0.9, "logprobs": 20},
        {"top_p": 0.999},
    ]
    for uniform in (0.0, 0.3, 0.9, 0.999999):
        check_rows(logits, [plain(uniform, temperature=1.0, **fields) for fields in asked])


def plain(uniform: float = 0.0, **fields: Any) -> SamplingInput:
    params = SamplingParams(**fields)
    return SamplingInput(params=params, uniform=uniform, prompt=[], output=[], forbidden=[])


def test_greedy_rows_stay_greedy_in_mixed_company() -> None:
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    rows = [plain(0.7, temperature=3.0 * (i % 3 == 0), top_p=0.9) for i in range(9)]
    found = sample(logits, rows)
    best = logits.argmax(-1).tolist()
    assert [t for i, t in enumerate(found.token_ids) if i % 3] == [
        t for i, t in enumerate(best) if i % 3
    ]
    assert sample(logits, [plain()] * 9).token_ids == tuple(best)
    kept = logits.clone()
    sample(logits, [plain(presence_penalty=1.0)] * 9)
    assert torch.equal(logits, kept), "the logits are the caller's"


def test_a_row_that_is_not_a_number_leaves_the_others_alone() -> None:
    """A damaged model must not take the engine down."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = [plain(0.7, temperature=1.0, top_p=0.9, top_k=30, min_p=0.01)] * 3
    whole = sample(logits, rows)
    logits[1] = torch.nan
    found = sample(logits, rows)
    assert [entry(found, i) for i in (0, 2)] == [entry(whole, i) for i in (0, 2)]
    assert 0 <= found.token_ids[1] < 50


def test_no_rows_give_nothing() -> None:
    assert sample(torch.zeros(0, 5), []) == SamplerOutput()


@pytest.mark.parametrize(
    "fields", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "min_p": 0.05}]
)
@pytest.mark.parametrize("num", [4000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_frequencies_are_the_probabilities(fields: dict[str, Any], num: int) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.9])
    source, row = random.Random(7), plain(**fields)
    rows = [replace(row, uniform=source.random()) for _ in range(num)]
    drawn = torch.tensor(sample(logits.expand(num, -1), rows).token_ids)
    found = torch.bincount(drawn, minlength=8)
    weights = (logits.double() / fields["temperature"]).exp()
    if "top_k" in fields:  # 6 are left, then those that reach 0.9; all have 0.05 of the likeliest
        order = weights.argsort(descending=True)[:6]
        kept = weights[order].cumsum(0)
        weights[
            [i for i in range(8) if i not in order[: int((kept < 0.9 * kept[-1]).sum()) + 1]]
        ] = 0
    probs = weights / weights.sum()
    assert found[probs == 0].sum() == 0
    sigma = (num * probs * (1 - probs)).sqrt()
    assert ((found - num * probs).abs() <= 4.5 * sigma).all()
