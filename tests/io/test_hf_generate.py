"""`generate` of `transformers` on our models, held to the engine and the reference generator."""

from typing import Any

import pytest
import torch
from hf_models import left_padded, random_ids, tiny_pair
from transformers import AutoModelForCausalLM, GenerationConfig

from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.errors import RequestError
from mor.model.generation import generate
from mor.model.sampling import SamplingParams

PROMPTS = [random_ids(n, seed=n).tolist() for n in (17, 5, 11)]
NEW = 12


# The other kinds: see the cache in test_hf_model.py.
@pytest.mark.parametrize(
    "kind",
    ["vanilla", "sequence", "expert", "expert_shared", "expert_relaxed", "expert_bare", "token"],
)
def test_a_padded_batch_is_continued_as_the_engine_does(kind: str) -> None:
    model, hf = tiny_pair(kind)
    engine = LLM(model, EngineConfig(max_num_batched_tokens=64, kv_cache_memory_bytes=2**22))
    expected = engine.generate(PROMPTS, SamplingParams(max_tokens=NEW))
    out = hf.generate(
        **left_padded(PROMPTS), max_new_tokens=NEW, return_dict_in_generate=True, pad_token_id=0
    )
    width = max(map(len, PROMPTS))
    for number, completion in enumerate(expected):
        counts = out.recursion_counts[number].tolist()
        assert out.sequences[number, width:].tolist() == completion.token_ids
        assert counts[width - 1 :] == completion.recursion_counts
        prompt_counts = completion.prompt_recursion_counts
        assert counts[width - len(prompt_counts) : width] == prompt_counts


@pytest.mark.parametrize(
    "dial",
    [{"min_recursions": 2}, {"max_recursions": 2}, {"min_recursions": 1, "max_recursions": 1}],
)
@pytest.mark.parametrize("home", ["argument", "generation_config"])
def test_the_dials_are_those_of_the_engine(dial: dict[str, int], home: str) -> None:
    model, hf = tiny_pair()
    ours = {k.replace("num_", ""): v for k, v in dial.items()}
    (expected,) = generate(model, PROMPTS[:1], SamplingParams(max_tokens=NEW, **ours))
    arguments: dict[str, Any] = dial
    if home == "generation_config":
        arguments = {"generation_config": GenerationConfig(max_new_tokens=NEW, **dial)}
    out = hf.generate(
        torch.tensor(PROMPTS[:1]),
        return_dict_in_generate=True,
        **{"max_new_tokens": NEW} | arguments,
    )
    assert out.sequences[0, -NEW:].tolist() == expected.token_ids
    assert out.recursion_counts[0, -NEW:].tolist() == expected.recursion_counts


@pytest.mark.parametrize("kind", ["expert", "expert_shared", "token"])
def test_other_ways_of_generating_agree_with_computing_everything_again(kind: str) -> None:
    _, hf = tiny_pair(kind)
    ids = torch.tensor(PROMPTS[:1])
    greedy = hf.generate(ids, max_new_tokens=NEW)
    assert torch.equal(hf.generate(ids, max_new_tokens=NEW, use_cache=False), greedy)
    assert torch.equal(hf.train().generate(ids, max_new_tokens=NEW), greedy)
    looked_up = hf.eval().generate(ids, max_new_tokens=NEW, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, greedy)
    beams = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2}
    again = hf.generate(ids, **beams, use_cache=False)
    assert torch.equal(hf.generate(ids, **beams), again)
    assert not torch.equal(again[0], again[1])
    torch.manual_seed(1)
    drawn = hf.generate(ids, max_new_tokens=5, do_sample=True, top_k=5, num_return_sequences=3)
    torch.manual_seed(1)
    again = hf.generate(
        ids, max_new_tokens=5, do_sample=True, top_k=5, num_return_sequences=3, use_cache=False
    )
    assert torch.equal(drawn, again)


def test_a_cache_is_continued() -> None:
    _, hf = tiny_pair()
    ids = torch.tensor(PROMPTS[:1])
    whole = hf.generate(ids, max_new_tokens=NEW)
    first = hf.generate(ids, max_new_tokens=7, return_dict_in_generate=True)
    rest = hf.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=NEW - 7
    )
    assert torch.equal(rest, whole)
    embedded = hf.generate(inputs_embeds=hf.model.embed_tokens(ids), max_new_tokens=NEW)
    assert torch.equal(embedded, whole[:, ids.shape[1] :])


def test_the_rows_of_a_cache_can_be_chosen() -> None:
    _, hf = tiny_pair()
    ids = random_ids(2, 9)
    cache = hf(ids[:, :8]).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    out = hf(ids[[1, 0], 8:], past_key_values=cache)
    torch.testing.assert_close(out.logits[:, 0], hf(ids).logits[[1, 0], -1], rtol=0, atol=1e-10)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(
        hf(ids, past_key_values=cache).logits, hf(ids).logits, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "paged"}, "generate_batch gives wrong tokens"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search does not work"),
        ({"min_recursions": 7}, "min_recursions=7 must lie in 1..3"),
    ],
)
def test_what_would_give_wrong_tokens_is_refused(kwargs: dict[str, Any], message: str) -> None:
    _, hf = tiny_pair()
    with pytest.raises(RequestError, match=message):
        hf.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=4, **kwargs)


def test_generate_batch_is_refused() -> None:
    _, hf = tiny_pair()
    with pytest.raises(RequestError, match="use generate with a padded batch"):
        hf.generate_batch(PROMPTS, max_new_tokens=4)
    with pytest.raises(RequestError, match="generate_batch gives wrong tokens"):
        hf.init_continuous_batching()


def test_import_mor_registers_with_the_auto_classes() -> None:
    config = tiny_pair()[1].config
    assert AutoModelForCausalLM.from_config(config).config.model_type == "mor"
