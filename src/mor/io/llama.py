"""Read checkpoints of the Llama architecture (Llama, SmolLM, TinyLlama) and of Qwen3.

A vanilla model computes the same function; a recursive one is initialized from the Llama's layers
(`io.uptrain`) and has to be trained further. What a vanilla model would compute differently is
refused by name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mor.errors import CheckpointError, ConfigError
from mor.io import gguf
from mor.io.checkpoint import GENERATION, save_new
from mor.io.tokenizer import TOKENIZER_FILE, Tokenizer
from mor.io.uptrain import init_from_vanilla
from mor.io.weights import read_json, read_weights
from mor.model.config import LLAMA_FIELDS, MoRConfig
from mor.model.sharing import Initialization
from mor.model.transformer import MoRModel

# By `model_type`: the class of transformers, and its config's defaults for what a config.json
# leaves out, with the fields of `MoRConfig` that the type stands for.
_ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
)
_LLAMA_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
)
_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": _LLAMA_DEFAULTS,
        "qwen3": {
            **_LLAMA_DEFAULTS,
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "qk_norm": True,
        },
    }
)
_UNSHARED: Mapping[str, str] = MappingProxyType(
    {
        "embed_tokens.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
)


@dataclass(frozen=True, kw_only=True)
class LlamaCheckpoint:
    """The contents of a Llama's folder or file, under Hugging Face's names."""

    source: Path
    config: Mapping[str, Any]
    """Contents of `config.json`."""
    state: Mapping[str, Tensor]
    """Weights by name."""
    tokenizer: Tokenizer | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Contents of `generation_config.json`; empty without one."""


def read_llama(source: Path | str) -> LlamaCheckpoint:
    """Read a folder in Hugging Face's layout, or a GGUF file.

    Raises:
        CheckpointError: a file is missing or damaged.
        DataError: its tokenizer cannot be read.
        MissingExtraError: a GGUF file without the package that reads it.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        config, state, tokenizer = gguf.read_gguf(path)
        return LlamaCheckpoint(source=path, config=config, state=state, tokenizer=tokenizer)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is no checkpoint: give a folder with config.json and weights, or a .gguf file."
        )
    generation = path / GENERATION
    return LlamaCheckpoint(
        source=path,
        config=read_json(path / "config.json"),
        state=read_weights(path),
        tokenizer=Tokenizer.load(path) if (path / TOKENIZER_FILE).is_file() else None,
        generation=read_json(generation) if generation.is_file() else {},
    )


def llama_fields(values: Mapping[str, Any], name: str = "config.json") -> dict[str, Any]:
    """The fields of `MoRConfig` that a Llama's `config.json` gives, numbers of layers aside.

    Raises:
        CheckpointError: it asks for something that has no counterpart here.
    """
    refused = {
        "attention_bias": bool(values.get("attention_bias")),
        "mlp_bias": bool(values.get("mlp_bias")),
        "hidden_act": values.get("hidden_act", "silu") != "silu",
        "quantization_config": values.get("quantization_config") is not None,
        "partial_rotary_factor": values.get("partial_rotary_factor", 1.0) != 1.0,
        "use_sliding_window": bool(values.get("use_sliding_window")),
    }
    for key, asked in refused.items():
        if asked:
            raise CheckpointError(f"{name}: {key}={values[key]!r} has no counterpart here.")
    defaults = _DEFAULTS.get(str(values.get("model_type")), _LLAMA_DEFAULTS)
    # qk_norm is no key of theirs: the model's type implies it.
    theirs = (f for f in LLAMA_FIELDS if f != "qk_norm")
    fields = {f: values[f] for f in theirs if values.get(f) is not None}
    for rope in (values.get(key) or {} for key in ("rope_scaling", "rope_parameters")):
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(
                f"{name}: RoPE scaling {rope_type!r} is not supported: only the plain angles of "
                "rope_theta are; without it the model would compute something else."
            )
        if rope.get("rope_theta") is not None:
            fields["rope_theta"] = rope["rope_theta"]
    # Several ends of text stay in generation_config.json; the config takes the first.
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = fields.pop(token, None)
        first = (ids or [None])[0] if isinstance(ids, list) else ids
        if first is not None and first >= 0:  # some write -1 for none
            fields[token] = first
    return {**defaults, **fields}


def config_from_llama(values: Mapping[str, Any], name: str = "config.json") -> MoRConfig:
    """The config of the vanilla model that a Llama's `config.json` describes.

    Raises:
        CheckpointError: it is neither Llama nor Qwen3, or computes something that we do not.
    """
    kind = values.get("model_type")
    wanted = _ARCHITECTURES.get(str(kind))
    classes = values.get("architectures") or [wanted]
    if wanted is None or classes != [wanted]:
        known = " and ".join(f"{k!r} ({v})" for k, v in _ARCHITECTURES.items())
        raise CheckpointError(
            f"{name} describes a model of type {kind!r} ({', '.join(map(str, classes))}): only "
            f"{known} can be read."
        )
    try:
        return MoRConfig(
            **llama_fields(values, name),
            num_prelude_layers=0,
            num_block_layers=values.get("num_hidden_layers", 32),
            num_coda_layers=0,
            num_recursions=1,
            routing="none",
        )
    except ConfigError as error:
        raise CheckpointError(f"{name}: {error}") from error


def vanilla_from_llama(checkpoint: LlamaCheckpoint, dtype: torch.dtype | None = None) -> MoRModel:
    """The vanilla model that computes what the Llama does, in evaluation mode.

    Args:
        dtype: of the parameters; None keeps the checkpoint's.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape, or two that the
            configuration ties differ.
    """
    config = config_from_llama(checkpoint.config, f"{checkpoint.source}: config.json")
    source, state = checkpoint.source, dict(checkpoint.state)
    model = MoRModel(config)
    names = {ours: _llama_name(ours) for ours in model.state_dict()}  # ours -> theirs
    if config.tie_word_embeddings:
        head = state.pop(names.pop("lm_head.weight"), None)
        if head is not None and not torch.equal(
            head, state.get(names["embed_tokens.weight"], head)
        ):
            raise CheckpointError(
                f"{source}: 'lm_head.weight' differs from 'model.embed_tokens.weight', which its "
                "config.json ties it to: set tie_word_embeddings to false there."
            )
    expected = {ours: value.shape for ours, value in model.state_dict().items() if ours in names}
    for ours, shape in expected.items():
        theirs = names[ours]
        if theirs not in state:
            raise CheckpointError(f"{source} lacks {theirs!r}, which its config.json asks for.")
        if state[theirs].shape != shape:
            raise CheckpointError(
                f"{source}: {theirs!r} has shape {tuple(state[theirs].shape)}, its config.json "
                f"asks for {tuple(shape)}."
            )
        if not state[theirs].is_floating_point():
            raise CheckpointError(f"{source}: {theirs!r} holds {state[theirs].dtype}, no weights.")
    # A weight that is not read would change the function; only tables of angles may be left.
    known = set(names.values())
    for theirs in sorted(state):
        if theirs not in known and not theirs.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(f"{source} holds {theirs!r}, for which its config.json has none.")
    model.to(dtype or state[names["embed_tokens.weight"]].dtype)
    model.load_state_dict({ours: state[theirs] for ours, theirs in names.items()}, strict=False)
    return model.eval()


def recursive_config(
    donor: MoRConfig, init: Initialization = "stepwise", sharing: str = "middle_cycle", **given: Any
) -> MoRConfig:
    """The config of the recursive model that is initialized from a vanilla one.

    Args:
        sharing: `cycle`, `sequence`, or these with `middle_` before: one unshared layer at each
            end, as in the paper, unless `given` says how many.
        **given: any field of the config; `num_block_layers` defaults to the donor's middle layers
            divided by `num_recursions`, rounded up (down for `average`, which needs them all).

    Raises:
        ConfigError: a field or a combination cannot work.
    """
    ends = int(sharing.startswith("middle_"))
    fields: dict[str, Any] = {
        **{name: getattr(donor, name) for name in LLAMA_FIELDS},
        "num_prelude_layers": ends,
        "num_coda_layers": ends,
        "num_recursions": 3,
        "sharing": sharing.removeprefix("middle_"),
        "twin_num_layers": donor.num_hidden_layers,
        **given,
    }
    if "num_block_layers" not in fields:
        unshared = (
            fields["num_prelude_layers"],
            fields["num_coda_layers"],
            fields["num_recursions"],
        )
        # Counts that cannot be computed with: let the config refuse them by name.
        if not all(isinstance(n, int) and n >= 0 for n in unshared) or not unshared[2]:
            return MoRConfig.from_dict(fields)
        share = (donor.num_hidden_layers - unshared[0] - unshared[1]) / unshared[2]
        fields["num_block_layers"] = math.floor(share) if init == "average" else math.ceil(share)
    return MoRConfig.from_dict(fields)


def from_llama(
    source: Path | str,
    *,
    init: Initialization = "stepwise",
    sharing: str = "middle_cycle",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **fields: Any,
) -> MoRModel:
    """The model made from a Llama's checkpoint: vanilla, or recursive with `num_recursions` > 1.

    Raises:
        CheckpointError: the checkpoint is damaged or no Llama; the message names the tensor.
        ConfigError: a field cannot work.
    """
    return _build(read_llama(source), init, sharing, seed, dtype, fields)


def convert_llama(
    source: Path | str,
    out: Path | str,
    *,
    init: Initialization = "stepwise",
    sharing: str = "middle_cycle",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **fields: Any,
) -> MoRModel:
    """Write what `from_llama` makes to a new folder, with tokenizer and generation config.

    Raises:
        CheckpointError, ConfigError: as `from_llama`; or `out` exists or cannot be written.
        CapacityError: the disk is full.
    """
    if Path(out).exists():  # before anything is read
        raise CheckpointError(f"{out} exists: choose a new folder, or remove it first.")
    checkpoint = read_llama(source)
    model = _build(checkpoint, init, sharing, seed, dtype, fields)
    save_new(model, out, checkpoint.tokenizer, checkpoint.generation)
    return model


def _build(
    checkpoint: LlamaCheckpoint,
    init: Initialization,
    sharing: str,
    seed: int,
    dtype: torch.dtype | None,
    fields: Mapping[str, Any],
) -> MoRModel:
    recursions = fields.get("num_recursions", 1)
    others = [name for name in fields if name != "num_recursions"]
    if recursions == 1 and others:
        name = others[0]
        raise ConfigError(f"{name} needs num_recursions >= 2: a vanilla model is the Llama itself.")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)  # routers are drawn anew
        vanilla = vanilla_from_llama(checkpoint, dtype)
        if recursions == 1:
            return vanilla
        config = recursive_config(vanilla.config, init, sharing, **fields)
        return init_from_vanilla(vanilla, config, init, seed).eval()


def _llama_name(ours: str) -> str:
    return _UNSHARED.get(ours) or f"model.layers.{ours.removeprefix('block.')}"
