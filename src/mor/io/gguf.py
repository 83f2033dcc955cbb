"""Read GGUF files of the Llama architecture: dequantized weights, and the tokenizer.

llama.cpp rotates neighboring numbers of a head where Hugging Face rotates number i with i + D / 2,
so its converter reorders the rows of the query and key projections; here they are put back. The
tokenizer is rebuilt from the metadata.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors
from torch import Tensor

from mor.errors import CheckpointError, MissingExtraError
from mor.io.tokenizer import TOKENIZER_CONFIG, Tokenizer

_CONFIG: Mapping[str, str] = MappingProxyType(  # field of MoRConfig -> metadata key after "llama."
    {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "max_position_embeddings": "context_length",
        "rope_theta": "rope.freq_base",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }
)
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TENSORS: Mapping[str, str] = MappingProxyType(
    {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
# How "llama-bpe" splits a text before byte-pair encoding.
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe")  # GGUF's names of the rules for splitting
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types
# What the gguf package raises somewhere inside for a damaged file.
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, OverflowError, NotImplementedError, OSError)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Tokenizer]:
    """Config and fp32 weights of a Llama under Hugging Face's names, and its tokenizer.

    Raises:
        CheckpointError: the file is damaged, or no Llama.
        MissingExtraError: the extra `gguf` is not installed.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    try:
        opened = _open(path)
        metadata = {name: value.contents() for name, value in opened.fields.items()}
        config = _config(path, metadata, {tensor.name for tensor in opened.tensors})
        state = dict(_weights(path, opened.tensors, config))
    except _DAMAGE as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged or no GGUF file ({error}).") from error
    return config, state, _tokenizer(path, metadata)


def _open(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error

    class Reader(gguf.GGUFReader):
        """A reader whose error names the first tensor that lies beyond the file's end."""

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            built: list[Any] = []
            for field in fields:
                try:
                    super()._build_tensors(start_offs, [field])
                except ValueError as error:
                    raise CheckpointError(
                        f"{path} ends before the end of {field.name!r}: copy it again."
                    ) from error
                built += self.tensors
            self.tensors = built

    return Reader(path)


def _config(path: Path, metadata: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The contents of the `config.json` that Hugging Face would have for this model."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{path} holds a model of architecture {architecture!r}: only 'llama' can be read."
        )
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in names:
        raise CheckpointError(
            f"{path}: RoPE scaling is not supported ('rope_freqs.weight' or llama.rope.scaling)."
        )
    config = {
        ours: _as_written(metadata[f"llama.{theirs}"])
        for ours, theirs in _CONFIG.items()
        if f"llama.{theirs}" in metadata
    }
    for field in _REQUIRED:
        if field not in config:
            raise CheckpointError(f"{path}: the metadata lacks llama.{_CONFIG[field]}.")
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    rotated = metadata.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise CheckpointError(f"{path}: RoPE turns {rotated} of {head_dim} numbers of a head only.")
    for field in ("bos", "eos", "padding"):
        token = metadata.get(f"tokenizer.ggml.{field}_token_id")
        if token is not None:
            config[f"{field.removesuffix('ding')}_token_id"] = token
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **config,
        "vocab_size": len(metadata.get("tokenizer.ggml.tokens", ())),
        "tie_word_embeddings": "output.weight" not in names,
    }


def _as_written(value: Any) -> Any:
    """A number before the file rounded it to fp32: 1e-05 for 9.99999974e-06."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _weights(
    path: Path, tensors: Sequence[Any], config: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 tensor) of each weight, under Hugging Face's names."""
    from gguf.quants import dequantize

    heads = config["num_attention_heads"]
    for tensor in tensors:
        *layer, kind, suffix = tensor.name.split(".")  # "blk.3.attn_q.weight", "output.weight"
        known = kind in _TENSORS and suffix == "weight"
        if not known or (layer and (layer[0] != "blk" or len(layer) != 2)):
            raise CheckpointError(f"{path} holds {tensor.name!r}, which no Llama has.")
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if kind in ("attn_q", "attn_k"):
            count = heads if kind == "attn_q" else config.get("num_key_value_heads", heads)
            weight = _halves_first(weight, count)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        yield f"{prefix}{_TENSORS[kind]}.weight", weight


def _halves_first(weight: Tensor, num_heads: int) -> Tensor:
    """The (H D, E) matrix with its rows (head, pair, half) in the order (head, half, pair)."""
    pairs = weight.view(num_heads, -1, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tokenizer(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that the metadata describes, with its chat template."""
    ggml = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    model, pre = ggml.get("model"), ggml.get("pre")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{path}: a tokenizer of kind {model!r} with rules {pre!r} cannot be rebuilt (only "
            f"'gpt2' with {', '.join(_PRE_TOKENIZERS)}): convert the original checkpoint."
        )
    tokens: list[str] = ggml["tokens"]
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        bpe = models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the library raises a bare Exception
        raise CheckpointError(f"{path}: its tokenizer is damaged ({error}).") from error
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    # Control tokens are never read from text; user-defined ones are, before any other.
    for token, kind in zip(tokens, ggml.get("token_type", ()), strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            special = tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
            (backend.add_special_tokens if kind == _CONTROL else backend.add_tokens)([special])
    bos = ggml.get("bos_token_id")
    if ggml.get("add_bos_token") and bos is not None:
        first = tokens[bos]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, bos)]
        )
    return Tokenizer(backend, {TOKENIZER_CONFIG: _tokenizer_config(metadata, ggml, tokens)})


def _pre_tokenizer(rules: str) -> Any:
    """How a text is split before byte-pair encoding, by GGUF's name for the rules."""
    if rules == "llama-bpe":
        split = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_PATTERN), "isolated")
        return pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rules == "gpt-2":
        return words
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])


def _tokenizer_config(
    metadata: Mapping[str, Any], ggml: Mapping[str, Any], tokens: Sequence[str]
) -> str:
    """The text of `tokenizer_config.json`."""
    named = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {ours: ggml.get(f"{theirs}_token_id") for theirs, ours in named.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata.get("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    return json.dumps({k: v for k, v in config.items() if v is not None}, indent=2) + "\n"
