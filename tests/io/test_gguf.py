"""GGUF files: the weights, rows and tokenizer of the checkpoint that they were made from."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mor
from mor.errors import CheckpointError
from mor.io.gguf import read_gguf
from mor.io.llama import convert_llama, from_llama
from mor.io.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")

TEXT = "The 1,234 cats didn't see 数学 — naïve 🙂\n\n\tdef f(x):  return x ** 2\r\n"
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_block_layers": 2,
    "num_recursions": 1,
    "routing": "none",
    "num_prelude_layers": 0,
    "num_coda_layers": 0,
    "rope_theta": 5e4,
}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def pairs_first(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of the rows of a query or key projection."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def model_and_tokenizer(tied: bool = True) -> tuple[mor.MoRModel, Tokenizer]:
    tokenizer = Tokenizer.train([TEXT, "the cat in the hat"], 300)
    torch.manual_seed(0)
    config = mor.MoRConfig(vocab_size=tokenizer.vocab_size, tie_word_embeddings=tied, **SHAPE)
    return mor.MoRModel(config).eval(), tokenizer


def write(path: Path, model: mor.MoRModel, tokenizer: Tokenizer, **changes: Any) -> Path:
    """A GGUF file as llama.cpp's converter writes it, but for `changes`."""
    config = model.config
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_block_count(config.num_block_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_heads_and_dim[1])
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(changes.get("rope_dimensions", 16))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if "rope_scaling" in changes:
        writer.add_rope_scaling_type(changes["rope_scaling"])
    bpe = json.loads(tokenizer.to_json())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_tokenizer_model(changes.get("kind", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(m) for m in bpe["merges"]])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_chat_template("{{ messages }}")
    for name, value in model.state_dict().items():
        theirs = changes.get("rename", lambda name: name)(their_name(name))
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        value = pairs_first(value, heads) if heads else value
        kind = changes.get("quantization")
        if kind is not None and value.dim() == 2:
            packed = gguf.quants.quantize(value.numpy(), kind)
            writer.add_tensor(theirs, packed, raw_dtype=kind)
        else:
            writer.add_tensor(theirs, np.ascontiguousarray(value.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def their_name(ours: str) -> str:
    unshared = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    stem = ours.removesuffix(".weight")
    if stem in unshared:
        return f"{unshared[stem]}.weight"
    _, layer, rest = stem.split(".", 2)
    return f"blk.{layer}.{NAMES[rest]}.weight"


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    model, tokenizer = model_and_tokenizer(tied)
    path = write(tmp_path / "model.gguf", model, tokenizer)
    again = from_llama(path)
    expected = {**model.config.to_dict(), "bos_token_id": 0, "eos_token_id": 0}
    got = again.config.to_dict()
    assert got["rms_norm_eps"] == 1e-5  # the file holds the nearest fp32 number
    assert got == expected
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert (again.lm_head.weight is again.embed_tokens.weight) == tied


def test_quantized_weights_are_their_rounded_values(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer()
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write(tmp_path / "model.gguf", model, tokenizer, quantization=kind)
    again = from_llama(path)
    for name, value in model.state_dict().items():
        step = value.abs().max() / 127
        difference = (again.state_dict()[name] - value).abs().max()
        assert difference <= step * 0.6, name
        assert (difference > 0) == (value.dim() == 2), name


def test_tokenizer_and_chat_template_are_rebuilt(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer()
    convert_llama(write(tmp_path / "model.gguf", model, tokenizer), tmp_path / "out")
    again = Tokenizer.load(tmp_path / "out")
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.decode(again.encode(TEXT)) == TEXT
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}"
    assert config["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize(("pre", "pieces"), [("smollm", 4), ("llama-bpe", 3), ("gpt-2", 1)])
def test_digits_are_cut_as_the_rules_say(tmp_path: Path, pre: str, pieces: int) -> None:
    tokenizer = Tokenizer.train(["1234 1234 1234 1234 1234"], 300)  # 1234 is one entry
    config = mor.MoRConfig(vocab_size=tokenizer.vocab_size, **SHAPE)
    path = write(tmp_path / "model.gguf", mor.MoRModel(config), tokenizer, pre=pre)
    again = read_gguf(path)[2]
    assert len(again.encode("1234")) == pieces
    assert again.decode(again.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"rope_scaling": gguf.RopeScalingType.LINEAR}, "RoPE scaling"),
        ({"rope_dimensions": 8}, "RoPE turns 8 of 16"),
        ({"kind": "llama"}, "a tokenizer of kind 'llama'"),
        ({"pre": "qwen2"}, "rules 'qwen2'"),
        ({"rename": lambda name: name.replace("blk.1.ffn_up", "blk.1.ffn_upper")}, "ffn_upper"),
        ({"rename": lambda name: name.replace("blk.1.", "blk.2.")}, "model.layers.1.input_lay"),
    ],
)
def test_what_is_no_plain_llama_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model, tokenizer = model_and_tokenizer()
    path = write(tmp_path / "model.gguf", model, tokenizer, **changes)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        convert_llama(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "model.gguf"
    return write(path, *model_and_tokenizer()).read_bytes()


@pytest.mark.parametrize("share", [0, 0.0001, 0.001, 0.01, 0.05, 0.5, 0.9, 0.9999])
def test_a_truncated_file_is_refused(tmp_path: Path, good: bytes, share: float) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(good[: int(share * len(good))])
    last = "ends before the end of 'output_norm" if share > 0.9 else ""
    with pytest.raises(CheckpointError, match=f"model.gguf {last}"):
        read_gguf(path)


def test_no_file_and_no_gguf(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_gguf(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("no weights " * 100)
    with pytest.raises(CheckpointError, match="no GGUF file"):
        read_gguf(tmp_path / "text.gguf")
