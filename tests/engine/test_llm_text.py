"""Texts in, texts out, and the texts that end a request."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import mor
from engine_helpers import check_empty, check_same, engine_of
from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.errors import CheckpointError, DataError
from mor.io.tokenizer import Tokenizer
from mor.model.generation import generate
from mor.model.sampling import SamplingParams
from mor.model.transformer import MoRModel
from tiny import tiny_model

TEXT = "the cat sat on the mat, the cat ate the rat; naïve café 猫が座った。😀🎉 "


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 3], 300)


@cache
def talker() -> MoRModel:
    """A model that knows the tokenizer's vocabulary and talks wildly."""
    return tiny_model("expert", vocab_size=300, initializer_range=0.3)


def talking(**fields: Any) -> LLM:
    return LLM(talker(), EngineConfig(kv_cache_memory_bytes=2**21, **fields), tokenizer=tokenizer())


def test_text_in_and_text_out() -> None:
    llm = talking()
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=1, ignore_eos=True, n=2)
    ids = tokenizer().encode("the cat")
    by_text, by_ids = llm.generate(["the cat"], params), llm.generate([ids], params)
    plain = generate(talker(), [ids], params)
    for one, other, want in zip(by_text, by_ids, plain, strict=True):
        assert one == other
        check_same(one, want)
        assert one.text == tokenizer().decode([*ids, *want.token_ids])[len("the cat") :]
    assert by_text[0].text != by_text[1].text
    check_empty(llm)


def test_deltas_of_a_stream_are_the_text() -> None:
    llm = talking()
    for seed in range(6):
        params = SamplingParams(max_tokens=25, temperature=1.5, seed=seed)
        events = list(llm.stream("猫", params))
        assert events[-1].completions is not None
        assert "".join(event.text for event in events) == events[-1].completions[0].text


def test_a_stop_text_ends_the_request_and_is_not_in_its_text() -> None:
    llm = talking()
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=5, ignore_eos=True)
    (free,) = llm.generate(["the "], params)
    for start in (3, 8, 12):
        stop = free.text[start : start + 3]
        fields = {"max_tokens": 40, "temperature": 1.0, "seed": 5, "ignore_eos": True}
        (done,) = llm.generate(["the "], SamplingParams(**fields, stop=["never!", stop]))
        assert done.finish_reason == "stop"
        assert done.text == free.text[: free.text.index(stop)]
        assert done.token_ids == free.token_ids[: len(done.token_ids)]
        assert stop in tokenizer().decode([*tokenizer().encode("the "), *done.token_ids])
        assert len(done.token_ids) < 40
        assert len(done.recursion_counts) == len(done.logprobs) == len(done.token_ids)
    check_empty(llm)


def test_a_stop_text_in_the_last_token_counts() -> None:
    llm = talking()
    fields = {"temperature": 1.0, "ignore_eos": True}
    found = 0
    for seed in range(20):
        params = SamplingParams(max_tokens=4, seed=seed, **fields)
        (free,) = llm.generate(["the "], params)
        broken = free.text.rstrip("\ufffd")
        if broken == free.text or not broken:
            continue
        stopping = SamplingParams(max_tokens=4, seed=seed, **fields, stop=broken[-1])
        (done,) = llm.generate(["the "], stopping)
        assert broken[-1] not in done.text
        assert done.finish_reason == "stop"
        found += 1
    assert found


def test_what_ends_a_request_is_not_in_its_text() -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=5, ignore_eos=True)
    (free,) = talking().generate(["the "], params)
    end = free.token_ids[9]
    first = free.token_ids.index(end)
    fields = {"max_tokens": 40, "temperature": 1.0, "seed": 5}
    asked = SamplingParams(**fields, ignore_eos=True, stop_token_ids=[end])
    (done,) = talking().generate(["the "], asked)
    assert done.token_ids == free.token_ids[: first + 1]
    assert done.finish_reason == "stop"
    start = tokenizer().encode("the ")
    assert done.text == tokenizer().decode([*start, *free.token_ids[:first]])[len("the ") :]


def test_the_tokenizers_end_of_text_ends_requests_where_the_model_names_none() -> None:
    assert talking().eos_token_id == tokenizer().eos_id == 0
    assert engine_of().eos_token_id is None
    named = tiny_model("expert", vocab_size=300, eos_token_id=9)
    assert (
        LLM(named, EngineConfig(kv_cache_memory_bytes=2**20), tokenizer=tokenizer()).eos_token_id
        == 9
    )
    params = SamplingParams(max_tokens=40, temperature=2.0, seed=0, n=25)
    completions = talking().generate([[5]], params)
    for done in completions:
        assert (done.finish_reason == "stop") == (done.token_ids[-1] == 0)
        assert 0 not in done.token_ids[:-1]
    assert {done.finish_reason for done in completions} == {"stop", "length"}


def test_a_folders_generation_config_may_list_more_ends(tmp_path: Path) -> None:
    mor.save(talker(), tmp_path, tokenizer=tokenizer())
    config = EngineConfig(kv_cache_memory_bytes=2**21)
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=5)
    (free,) = LLM(tmp_path, config).generate(["the "], replace(params, ignore_eos=True))
    end = free.token_ids[4]
    assert 0 not in free.token_ids[:5]
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [0, {end}]}}')
    (done,) = LLM(tmp_path, config).generate(["the "], params)
    assert done.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    (longer,) = LLM(tmp_path, config).generate(["the "], replace(params, min_tokens=20))
    assert not {0, end} & set(longer.token_ids[:20])
    (whole,) = LLM(tmp_path, config).generate(["the "], replace(params, ignore_eos=True))
    assert whole.token_ids == free.token_ids
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["a"]}')
    with pytest.raises(CheckpointError, match="must be a token id or a list"):
        LLM(tmp_path, config)


def test_a_folder_brings_its_tokenizer(tmp_path: Path) -> None:
    model = tiny_model("expert", vocab_size=300).float()
    mor.save(model, tmp_path, tokenizer=tokenizer())
    llm = LLM(str(tmp_path), EngineConfig(kv_cache_memory_bytes=2**21, kernels="reference"))
    (done,) = llm.generate(["the cat"], SamplingParams(max_tokens=5, ignore_eos=True))
    assert len(done.token_ids) == 5
    assert done.text
    with pytest.raises(DataError, match="Unicode"):
        llm.generate(["\ud800"])
    check_empty(llm)
