"""Read checkpoints of the paper's own code, the reference implementation.

It builds a Llama and then rewrites its layers, so the name of a parameter depends on routing and
sharing:

    expert choice  model.layers.{P + r}.block.{i}   and a `mor_router` per depth
    token choice   model.layers.{P}.block_list.{r}.{i}   and one `mor_router`
    recursive      plain layer numbers, the shared ones repeated

with depth r, block layer i, and P = 1 for the `middle_` sharings and 0 otherwise. Tied parameters
may appear once, under their first name, or under every name.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor.errors import CheckpointError, ConfigError
from mor.io.checkpoint import save_new
from mor.io.llama import llama_fields
from mor.io.tokenizer import TOKENIZER_FILE, Tokenizer
from mor.io.weights import read_json, read_weights
from mor.model.config import MoRConfig
from mor.model.sharing import block_schedule
from mor.model.transformer import MoRModel
from mor.yaml_config import read_yaml


def from_official(
    state_dict: Mapping[str, Tensor],
    llama_config: Mapping[str, Any],
    cfg: Mapping[str, Any],
) -> MoRModel:
    """A model with the reference implementation's parameters.

    Args:
        state_dict: parameters under the reference implementation's names.
        llama_config: contents of its `config.json`, a Llama's.
        cfg: contents of its YAML, with the sections `recursive`, `kv_sharing` and `mor`.

    Raises:
        ConfigError: the configuration asks for something that has no counterpart here.
        CheckpointError: a parameter is missing, unexpected or has the wrong shape.
    """
    state = {k.removeprefix("module."): v for k, v in state_dict.items()}
    config = config_from_official(state, llama_config, cfg)
    model = MoRModel(config).to(next(iter(state.values())).dtype)
    renamed = _rename(state, config)
    expected = model.state_dict()
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
        renamed.pop("lm_head.weight", None)
    for name, value in expected.items():
        if name not in renamed:
            raise CheckpointError(f"the checkpoint lacks a parameter for {name!r}.")
        if renamed[name].shape != value.shape:
            raise CheckpointError(
                f"the parameter for {name!r} has shape {tuple(renamed[name].shape)}, the "
                f"configuration says {tuple(value.shape)}."
            )
    unexpected = sorted(set(renamed) - set(expected))
    if unexpected:
        raise CheckpointError(f"the checkpoint has a parameter too many: {unexpected[0]!r}.")
    model.load_state_dict(renamed, strict=False)
    return model


def convert_official(
    folder: Path | str,
    out: Path | str,
    *,
    config: Path | str | None = None,
    llama_config: Path | str | None = None,
    tokenizer: Path | str | None = None,
) -> MoRModel:
    """Write the model of a published checkpoint to a new folder, and return it.

    Args:
        folder: holds the weights, safetensors or `pytorch_model.bin`, whole or in shards.
        config: its YAML; None: the only one in the folder.
        llama_config: its Llama's `config.json`; None: the one in the folder.
        tokenizer: `tokenizer.json` or its folder; None: the one in the folder, if any.

    Raises:
        CheckpointError: a file is missing or damaged, or a parameter does not fit.
        ConfigError: the configuration asks for something that has no counterpart here.
    """
    source = Path(folder)
    if not source.is_dir():
        raise CheckpointError(f"{source} is no folder: give the one that holds the weights.")
    found = [Path(config)] if config is not None else sorted(source.glob("*.y*ml"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"{source} holds {names} as YAML: say which with config=FILE.")
    llama = Path(llama_config) if llama_config is not None else source / "config.json"
    if not llama.is_file():
        raise CheckpointError(f"{llama} is missing: give the Llama's config.json, llama_config=.")
    words: Tokenizer | None = None
    if tokenizer is not None or (source / TOKENIZER_FILE).is_file():
        words = Tokenizer.load(source if tokenizer is None else tokenizer)
    model = from_official(read_weights(source), read_json(llama), read_yaml(found[0]))
    save_new(model, out, words)
    return model.eval()


def config_from_official(
    state: Mapping[str, Tensor], llama_config: Mapping[str, Any], cfg: Mapping[str, Any]
) -> MoRConfig:
    """The config of a reference checkpoint; numbers of layers come from its parameters' names."""
    shape = llama_fields(llama_config)
    head, embedding = state.get("lm_head.weight"), state.get("model.embed_tokens.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        shape["tie_word_embeddings"] = False  # whatever the Llama config says
    recursive = cfg.get("recursive") or {}
    mor = cfg.get("mor") or {}
    sharing = _supported(cfg, recursive)
    if not recursive.get("enable"):
        layers = {int(m[1]) for m in map(_PLAIN.match, state) if m}
        return MoRConfig(
            **shape,
            num_prelude_layers=0,
            num_block_layers=len(layers),
            num_coda_layers=0,
            num_recursions=1,
            routing="none",
        )
    middle = sharing.startswith("middle_")
    fields: dict[str, Any] = {
        **shape,
        "num_prelude_layers": int(middle),
        "num_coda_layers": int(middle),
        "num_recursions": recursive["num_recursion"],
        "sharing": sharing.removeprefix("middle_"),
        "kv_strategy": "shared"
        if (cfg.get("kv_sharing") or {}).get("enable")
        else "recursion_wise",
        "twin_num_layers": llama_config.get("num_hidden_layers"),
    }
    if mor.get("enable"):
        block = {m[1] for m in map(_BLOCK.match, state) if m}
        return MoRConfig.from_dict(
            {**fields, "num_block_layers": len(block), **_routing_fields(mor)}
        )
    # Without routing the layers are numbered as they run: R times those of the block.
    applied = llama_config["num_hidden_layers"] - 2 * int(middle)
    return MoRConfig(
        **fields, num_block_layers=applied // recursive["num_recursion"], routing="none"
    )


def official_names(config: MoRConfig) -> Callable[[str], str | None]:
    """A function from the reference implementation's parameter names to ours; None for buffers.

    Raises (when called):
        CheckpointError: no layer of such a model has a parameter of that name.
    """
    prefixes = _layer_prefixes(config)
    return lambda name: _our_name(name, prefixes, config)


# Layer numbers of models without routing, and block layer numbers of those with it.
_PLAIN = re.compile(r"model\.layers\.(\d+)\.(?!block|mor_router|mlp_router|router_bias)")
_BLOCK = re.compile(r"model\.layers\.(?:\d+\.block|(?:\d+\.)?block_list\.\d+)\.(\d+)\.")


def _supported(cfg: Mapping[str, Any], recursive: Mapping[str, Any]) -> str:
    """The name of the sharing.

    Raises:
        ConfigError: the configuration asks for something that has no counterpart here.
    """
    sharing = str(recursive.get("sharing", "cycle"))
    refused = {
        "recursive.ln_share=false (norms that differ by depth)": (
            recursive.get("enable") and recursive.get("ln_share") is False
        ),
        "relaxation.enable=true (depth-specific LoRA)": (cfg.get("relaxation") or {}).get("enable"),
        "kv_sharing.update_cache=true": (cfg.get("kv_sharing") or {}).get("update_cache"),
        f"recursive.sharing={sharing!r}": sharing
        not in ("cycle", "sequence", "middle_cycle", "middle_sequence"),
    }
    for what, asked in refused.items():
        if asked:
            raise ConfigError(f"{what} of the reference implementation is not supported.")
    return sharing


def _routing_fields(mor: Mapping[str, Any]) -> dict[str, Any]:
    """The routing fields of `MoRConfig`, from the section `mor`."""
    router_type = str(mor.get("router_type", "linear"))
    fields: dict[str, Any] = {
        "router_type": "random" if mor.get("rand_router") else router_type.removeprefix("wide_"),
        "router_temperature": float(mor.get("temp", 1.0)),
        "z_loss_coeff": float(mor.get("z_coeff", 0.001)) if mor.get("z_loss") else 0.0,
    }
    own = mor.get(mor["type"]) or {}  # the section of this routing, `expert` or `token`
    activation = own.get("router_func")
    if mor["type"] == "expert":
        sampling = own.get("sampling") or "none"
        return fields | {
            "routing": "expert_choice",
            "capacities": tuple(float(c) for c in str(mor["capacity"]).split(",")),
            "router_activation": activation or "none",
            "router_alpha": float(own.get("alpha", 0.1)),
            "selection_training": "none" if mor.get("rand_router") else sampling,
            "aux_loss_coeff": float(own.get("coeff", 0.001)),
            "gating": own.get("gating") or "weighted",
        }
    sigmoid = activation == "sigmoid"
    balancing = own.get("balancing") or "none"
    return fields | {
        "routing": "token_choice",
        "router_activation": "sigmoid" if sigmoid else "softmax",
        "router_alpha": float(own.get("alpha", 0.1 if sigmoid else 1.0)),
        "balancing": "none" if mor.get("rand_router") else balancing,
        "balancing_coeff": float(own.get("coeff", 0.1)),
        "balancing_update_rate": float(own.get("u", 0.001)),
        "gating": own.get("gating") or "weighted",
    }


def _rename(state: Mapping[str, Tensor], config: MoRConfig) -> dict[str, Tensor]:
    """Parameters under our names.

    Raises:
        CheckpointError: two parameters that are tied differ.
    """
    our_name = official_names(config)
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        ours = our_name(name)
        if ours is None:
            continue
        if ours in renamed and not torch.equal(renamed[ours], value):
            raise CheckpointError(
                f"{name!r} differs from another parameter that it is tied to ({ours!r}): the "
                "checkpoint was written by a version that lost its weight sharing."
            )
        renamed[ours] = value
    return renamed


def _layer_prefixes(config: MoRConfig) -> dict[str, str]:
    """Prefixes of layers and routers: the reference implementation's -> ours."""
    first, loops = config.num_prelude_layers, config.num_recursions
    schedule = block_schedule(config.sharing, config.num_block_layers, loops)
    expert, token = config.routing == "expert_choice", config.routing == "token_choice"
    prefixes = {f"model.layers.{i}.": f"prelude.{i}." for i in range(first)}
    # Token choice has one module for the whole block: the layer after the prelude if there is one.
    unshared = f"model.layers.{first}." if first else "model.layers."
    for i, layer_key in enumerate(schedule):
        if expert:
            theirs = f"model.layers.{first + layer_key.depth}.block.{layer_key.layer}."
        elif token:
            theirs = f"{unshared}block_list.{layer_key.depth}.{layer_key.layer}."
        else:
            theirs = f"model.layers.{first + i}."
        prefixes[theirs] = f"block.{layer_key.layer}."
    # Numbers that the block takes in `model.layers`, after which the coda's begin.
    block_numbers = len(schedule)
    if expert:
        block_numbers = loops
        for r in range(loops):
            prefixes[f"model.layers.{first + r}.mor_router."] = f"router.routers.{r}."
            prefixes[f"model.layers.{first + r}.mlp_router."] = f"router.aux_routers.{r}."
    elif token:
        block_numbers = 1
        prefixes[f"{unshared}mor_router."] = "router.router."
        prefixes[f"{unshared}router_bias"] = "router.bias"
    for i in range(config.num_coda_layers):
        prefixes[f"model.layers.{first + block_numbers + i}."] = f"coda.{i}."
    return prefixes


def _our_name(name: str, prefixes: Mapping[str, str], config: MoRConfig) -> str | None:
    """Our name of a parameter; None for buffers, which hold nothing learned."""
    unshared = {
        "model.embed_tokens.weight": "embed_tokens.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    if name in unshared:
        return unshared[name]
    if name.endswith("rotary_emb.inv_freq"):
        return None
    matches = [prefix for prefix in prefixes if name.startswith(prefix)]
    if not matches:
        raise CheckpointError(
            f"the checkpoint has a parameter {name!r} that no layer of a model with "
            f"routing={config.routing!r} and sharing={config.sharing!r} has."
        )
    prefix = max(matches, key=len)  # "model.layers.1." also begins "model.layers.1.block.0."
    rest = name.removeprefix(prefix)
    if "router" in prefix and "bias" not in prefix:
        linear = {"router.weight": "proj.weight"}
        mlp = {"router.0.weight": "up.weight", "router.2.weight": "down.weight"}
        rest = (linear | mlp).get(rest, rest)
    return prefixes[prefix] + rest
