"""`MoRForCausalLM`: what `transformers` asks of a model, held to the model itself."""

from typing import Any

import pytest
import torch
from hf_models import left_padded, random_ids, tiny_pair, wrapped
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from mor.errors import ConfigError, RequestError
from mor.io.hf.auto_model import MoRForCausalLM
from mor.io.hf.configuration import MoRPretrainedConfig
from tiny import KINDS, tiny_config

EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-10}
ROWS = [random_ids(n, seed=n).tolist() for n in (17, 5, 11)]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_counts_and_cache_are_those_of_the_model(kind: str) -> None:
    model, hf = tiny_pair(kind)
    ids = random_ids(2, 19)
    whole = model(ids)
    out = hf(ids)
    torch.testing.assert_close(out.logits, whole.logits, **EXACT)
    assert torch.equal(out.recursion_counts, whole.recursion_counts)
    cache, pieces = None, []
    for piece in ids.split([9, 1, 4, 5], dim=1):
        part = hf(piece, past_key_values=cache)
        cache = part.past_key_values
        pieces.append(part.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole.logits, **EXACT)
    assert cache.get_seq_length() == 19
    assert torch.equal(cache.recursion_counts, whole.recursion_counts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_its_sequences_give(kind: str, side: str) -> None:
    model, hf = tiny_pair(kind)
    batch = left_padded(ROWS)
    if side == "right":
        batch = {
            name: _to_the_left(values, batch["attention_mask"]) for name, values in batch.items()
        }
    out = hf(**batch, labels=batch["input_ids"], output_hidden_states=True)
    losses = 0.0
    for number, row in enumerate(ROWS):
        alone = model(torch.tensor([row]), labels=torch.tensor([row]))
        mine = batch["attention_mask"][number].bool()
        torch.testing.assert_close(out.logits[number, mine], alone.logits[0], **EXACT)
        assert torch.equal(out.recursion_counts[number, mine], alone.recursion_counts[0])
        assert not out.recursion_counts[number, ~mine].any()
        losses += float(alone.loss.detach()) * len(row)
    predicted = sum(len(row) - 1 for row in ROWS)
    torch.testing.assert_close(float(out.loss.detach()), losses / predicted, **EXACT)


def _to_the_left(values: Tensor, mask: Tensor) -> Tensor:
    """Rows rotated so that their padding is at the end."""
    shifts = (mask == 0).sum(1).tolist()
    return torch.stack([row.roll(-n) for row, n in zip(values, shifts, strict=True)])


@pytest.mark.parametrize(
    "kind", ["expert", "expert_aux_router", "expert_bare", "token", "recursive"]
)
def test_the_training_loss_is_that_of_the_model(kind: str) -> None:
    model, hf = tiny_pair(kind)
    ids = random_ids(2, 20)
    expected = model.train()(ids, targets=_shifted(ids))
    out = hf.train()(ids, labels=ids)
    predicted = ids.numel() - len(ids)
    torch.testing.assert_close(
        out.loss, expected.loss + (expected.total_loss - expected.loss), rtol=0, atol=1e-10
    )
    assert (out.aux_loss is None) == (not expected.aux_losses)
    assert torch.equal(out.recursion_counts, expected.recursion_counts)
    assert out.past_key_values is None
    share = hf(ids, labels=ids, num_items_in_batch=4 * predicted)  # one of four micro-batches
    torch.testing.assert_close(share.loss, out.loss / 4, rtol=0, atol=1e-10)
    out.loss.backward()
    expected.total_loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), hf.model.parameters(), strict=True):
        if ours.grad is None:
            assert theirs.grad is None, name
        else:
            torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-8, atol=1e-10, msg=name)


def _shifted(ids: Tensor) -> Tensor:
    return torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), dim=1)


def test_topk_counts_the_tokens_of_each_sequence_and_no_padding() -> None:
    model, hf = tiny_pair("expert")
    batch = left_padded(ROWS)
    counts = hf.train()(**batch).recursion_counts
    for number, row in enumerate(ROWS):
        alone = model(torch.tensor([row]), selection="topk").recursion_counts[0]
        assert torch.equal(counts[number, batch["attention_mask"][number].bool()], alone)


@pytest.mark.parametrize("kind", ["expert", "expert_shared", "token_shared", "sequence"])
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    _, hf = tiny_pair(kind)
    ids = random_ids(2, 20)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            getattr(hf, "activation_checkpointing_enable", hf.gradient_checkpointing_enable)()
            assert hf.model.activation_checkpointing == "full"
        hf.zero_grad()
        hf.train()(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in hf.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, **EXACT)


def test_hidden_states_of_a_vanilla_model_are_those_of_llama() -> None:
    model, hf = tiny_pair("vanilla")
    c = model.config
    llama_config = LlamaConfig(
        **{
            f: getattr(c, f) for f in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")
        },
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        num_hidden_layers=c.num_hidden_layers,
        rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=True,
    )
    llama = LlamaForCausalLM(llama_config).double().eval()
    layers = (*model.prelude, *model.block, *model.coda)
    llama.model.embed_tokens.load_state_dict(model.embed_tokens.state_dict())
    llama.model.norm.load_state_dict(model.norm.state_dict())
    for theirs, ours in zip(llama.model.layers, layers, strict=True):
        theirs.load_state_dict(ours.state_dict())
    ids = random_ids(1, 12)
    expected = llama(ids, output_hidden_states=True).hidden_states
    states = hf(ids, output_hidden_states=True).hidden_states
    assert len(states) == len(expected) == c.num_hidden_layers + 1
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # Llama's norm is in fp32


@pytest.mark.parametrize("kind", ["expert", "token", "sequence", "expert_bare"])
def test_hidden_states_of_a_routed_model(kind: str) -> None:
    model, hf = tiny_pair(kind)
    out = hf(random_ids(2, 12), output_hidden_states=True)
    c = model.config
    assert len(out.hidden_states) == c.num_hidden_layers + 1
    assert all(h.shape == (2, 12, c.hidden_size) for h in out.hidden_states)
    torch.testing.assert_close(hf.model.lm_head(out.hidden_states[-1]), out.logits, **EXACT)
    before_coda = out.hidden_states[c.num_hidden_layers - c.num_coda_layers]
    for depth in range(1, c.num_recursions):  # who stopped before this depth moves no more
        start = out.hidden_states[c.num_prelude_layers + depth * c.num_block_layers]
        stopped = out.recursion_counts < depth
        if c.num_coda_layers:
            assert torch.equal(start[stopped], before_coda[stopped])
    assert hf(random_ids(2, 12)).hidden_states is None


def test_embeddings_logits_to_keep_and_tuples() -> None:
    _, hf = tiny_pair()
    ids = random_ids(2, 10)
    whole = hf(ids)
    embedded = hf(inputs_embeds=hf.get_input_embeddings()(ids), logits_to_keep=3)
    torch.testing.assert_close(embedded.logits, whole.logits[:, -3:], **EXACT)
    places = torch.tensor([0, 7])
    picked = hf(ids, logits_to_keep=places, labels=ids, return_dict=False)
    torch.testing.assert_close(picked[1], whole.logits[:, places], **EXACT)


def test_resizing_the_embedding_keeps_head_and_embedding_tied() -> None:
    _, hf = tiny_pair()
    before = hf(random_ids(1, 8)).logits
    hf.resize_token_embeddings(70, mean_resizing=False)
    assert hf.config.vocab_size == 70
    assert hf.model.lm_head.weight is hf.model.embed_tokens.weight
    logits = hf(random_ids(1, 8)).logits
    assert logits.shape[-1] == 70
    torch.testing.assert_close(logits[..., :61], before, **EXACT)


def test_the_config_says_what_third_party_tools_read() -> None:
    config = MoRPretrainedConfig(**tiny_config("expert_bare").to_dict())
    assert config.num_hidden_layers == 4 * 2
    assert config.to_mor() == tiny_config("expert_bare")
    assert MoRPretrainedConfig.from_dict(config.to_dict()).to_mor() == config.to_mor()
    with pytest.raises(ConfigError, match="num_key_value_heads=3"):
        MoRPretrainedConfig(num_attention_heads=4, num_key_value_heads=3)


def test_a_model_from_scratch_is_initialized_like_ours() -> None:
    torch.manual_seed(0)
    config = tiny_config()
    model = MoRForCausalLM(MoRPretrainedConfig(**config.to_dict())).model
    for name, value in model.named_parameters():
        if "norm" in name:
            assert bool((value == 1).all()), name
        else:
            assert 0.5 < float(value.detach().std()) / config.initializer_range < 1.5, name
    assert model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input_ids": None}, "either input_ids or inputs_embeds"),
        ({"output_attentions": True}, "keeps no attention weights"),
        ({"attention_mask": torch.ones(1, 5)}, r"need \(1, 8\)"),
        ({"attention_mask": torch.zeros(1, 8)}, "0 everywhere"),
        ({"position_ids": torch.arange(8)[None] + 90}, "position 97 does not fit"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])}, "must rise"),
        ({"past_key_values": DynamicCache()}, "DynamicCache, which has no place"),
        ({"min_recursions": 4}, r"must lie in 1..3"),
        ({"max_recursions": 0}, r"must lie in 1..3"),
        ({"min_recursions": 3, "max_recursions": 2}, "at least min_recursions=3"),
        ({"min_recursions": 2, "selection": "topk"}, "need selection='threshold'"),
    ],
)
def test_what_cannot_be_done_is_refused(kwargs: dict[str, Any], message: str) -> None:
    _, hf = tiny_pair()
    with pytest.raises(RequestError, match=message):
        hf(**{"input_ids": random_ids(1, 8), **kwargs})


def test_more_refusals() -> None:
    _, hf = tiny_pair("sequence")
    with pytest.raises(RequestError, match="needs sharing='cycle'"):
        hf(random_ids(1, 8), max_recursions=1)
    assert hf(
        random_ids(1, 8), min_recursions=2, max_recursions=2
    ).recursion_counts.unique().tolist() == [2]
    _, hf = tiny_pair()
    cache = hf(random_ids(1, 8)).past_key_values
    with pytest.raises(RequestError, match="needs whole sequences"):
        hf(random_ids(1, 2), past_key_values=cache, selection="topk")


@pytest.mark.parametrize("kind", ["expert", "token", "recursive"])
def test_forced_and_largest_recursion_counts(kind: str) -> None:
    model, hf = tiny_pair(kind)
    ids = random_ids(2, 15)
    free = hf(ids).recursion_counts
    assert hf(ids, min_recursions=2, max_recursions=2).recursion_counts.unique().tolist() == [2]
    assert torch.equal(hf(ids, max_recursions=2).recursion_counts, free.clamp(max=2))
    assert free.max() == model.config.num_recursions
    assert wrapped(model)(ids).recursion_counts.equal(free)
