"""Qwen3 checkpoints: a Llama whose query and key heads are normalized before RoPE."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import wrapped

import mor
from mor.errors import CheckpointError, ConfigError
from mor.io.hf_export import export
from mor.io.llama import config_from_llama, convert_llama, from_llama

IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))


def qwen3(**overrides: Any) -> Any:
    """A Qwen3 of transformers with random weights, norms off their initial values."""
    torch.manual_seed(3)
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,  # heads together are wider than the hidden state, as in Qwen3 0.6B
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**shape, **overrides}))
    for name, value in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(value, 0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    qwen3().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_vanilla_has_the_logits_of_transformers(tmp_path: Path, tied: bool) -> None:
    theirs = qwen3(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "qwen3")
    ours = convert_llama(tmp_path / "qwen3", tmp_path / "ours")
    assert ours.config.qk_norm
    assert ours.config.tie_word_embeddings == tied
    with torch.no_grad():
        wanted = theirs(IDS).logits
        assert (ours(IDS).logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
        assert torch.equal(mor.load(tmp_path / "ours")(IDS).logits, ours(IDS).logits)


def test_the_engine_generates_what_transformers_generates(saved: Path) -> None:
    theirs = qwen3().double()
    engine = mor.LLM(
        from_llama(saved, dtype=torch.float64), mor.EngineConfig(kv_cache_memory_bytes=2**22)
    )
    prompts = [IDS[0, :7].tolist(), IDS[1, :20].tolist()]
    params = mor.SamplingParams(max_tokens=32, ignore_eos=True)
    for prompt, done in zip(prompts, engine.generate(prompts, params), strict=True):
        wanted = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert done.token_ids == wanted[0, len(prompt) :].tolist()


def test_the_compiled_cpu_kernels_are_not_chosen_for_it(saved: Path) -> None:
    model, memory = from_llama(saved), 2**22
    fields = {"kv_cache_memory_bytes": memory, "block_size": 16}
    assert mor.LLM(model, mor.EngineConfig(**fields)).backend.kernels == "reference"
    with pytest.raises(ConfigError, match="kernels='cpu' has no qk_norm yet"):
        mor.LLM(model, mor.EngineConfig(kernels="cpu", **fields))


def test_a_recursive_model_starts_from_its_layers(saved: Path) -> None:
    vanilla, recursive = from_llama(saved), from_llama(saved, num_recursions=2)
    assert recursive.config.qk_norm
    assert recursive.config.vanilla_twin().qk_norm
    assert torch.equal(
        recursive.prelude[0].self_attn.q_norm.weight, vanilla.block[0].self_attn.q_norm.weight
    )
    with torch.no_grad():
        assert bool(recursive(IDS).logits.isfinite().all())


def test_it_can_be_exported_for_transformers(saved: Path, tmp_path: Path) -> None:
    model = convert_llama(saved, tmp_path / "ours", num_recursions=2)
    folder = export(tmp_path / "ours", tmp_path / "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        wanted = wrapped(model)(IDS).logits
        torch.testing.assert_close(theirs.eval()(IDS).logits, wanted)


def test_what_a_config_leaves_out_has_qwen3s_defaults() -> None:
    theirs = transformers.Qwen3Config()
    ours = config_from_llama({"model_type": "qwen3", "num_hidden_layers": 2})
    for name in ("vocab_size", "intermediate_size", "head_dim", "num_key_value_heads"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert not config_from_llama({"model_type": "llama"}).qk_norm


@pytest.mark.parametrize("key", ["attention_bias", "use_sliding_window"])
def test_what_it_would_compute_differently_is_refused(saved: Path, key: str) -> None:
    values = json.loads((saved / "config.json").read_text())
    with pytest.raises(CheckpointError, match=f"{key}=True has no counterpart"):
        config_from_llama({**values, key: True})
