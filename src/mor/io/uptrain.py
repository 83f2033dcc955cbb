"""Starting a recursive model from a plain one (arXiv 2507.10524, appendix on uptraining)."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mor.errors import ConfigError
from mor.model.config import MoRConfig
from mor.model.depth_lora import DepthLoRALinear
from mor.model.sharing import Initialization, original_layers, source_layers
from mor.model.transformer import MoRModel
from mor.ops.low_rank import LoRAPair

_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps", "tie_word_embeddings"),
)

_NORMS: Mapping[str, str] = MappingProxyType(
    {  # before each matrix of a layer
        **{f"self_attn.{name}_proj": "input_layernorm" for name in "qkv"},
        **{f"mlp.{name}_proj": "post_attention_layernorm" for name in ("gate", "up")},
        "self_attn.o_proj": "",
        "mlp.down_proj": "",
    }
)


@torch.no_grad()
def init_from_vanilla(
    donor: MoRModel, config: MoRConfig, init: Initialization = "stepwise", seed: int = 0
) -> MoRModel:
    """A model of `config` whose layers start from a vanilla donor's.

    Embedding, final norm and head are the donor's; prelude and coda start from its first and last
    layers, the block from its middle layers as `source_layers` says; routers start at random. With
    `relaxation_rank` the deltas of each depth start from the truncated singular value decomposition
    of what the block lost: the layer that it stands for there, minus the shared one.

    Args:
        seed: of the layers that `init='random'` draws.

    Raises:
        ConfigError: the donor is not vanilla, has other widths, or too few layers.
    """
    if donor.config.num_recursions != 1:
        raise ConfigError(
            f"the donor has num_recursions={donor.config.num_recursions}: only a vanilla model "
            "has layers of its own to give."
        )
    for name in _SAME:
        ours, theirs = getattr(config, name), getattr(donor.config, name)
        if ours != theirs:
            raise ConfigError(
                f"{name}={ours!r} differs from the donor's {theirs!r}: only the number of layers "
                "and how they are shared may change."
            )
    layers = [*donor.prelude, *donor.block, *donor.coda]
    sources = source_layers(
        init,
        sharing=config.sharing,
        num_donor_layers=len(layers),
        num_prelude_layers=config.num_prelude_layers,
        num_block_layers=config.num_block_layers,
        num_coda_layers=config.num_coda_layers,
        num_recursions=config.num_recursions,
        seed=seed,
    )
    twin_layers = config.twin_num_layers or len(layers)
    model = MoRModel(dataclasses.replace(config, twin_num_layers=twin_layers))
    model.to(donor.embed_tokens.weight.dtype)
    _copy(model.embed_tokens, [donor.embed_tokens])
    _copy(model.lm_head, [donor.lm_head])
    _copy(model.norm, [donor.norm])
    for i, layer in enumerate(model.prelude):
        _copy(layer, [layers[i]])
    for i, layer in enumerate(model.coda):
        _copy(layer, [layers[len(layers) - config.num_coda_layers + i]])
    for layer, drawn in zip(model.block, sources, strict=True):
        _copy(layer, [layers[i] for i in drawn])
    if config.relaxation_rank:
        last = len(layers) - config.num_coda_layers
        shape = config.sharing, config.num_block_layers, config.num_recursions
        for slot, i in original_layers(*shape, config.num_prelude_layers, last).items():
            _relax(model.block[slot.layer], layers[i], slot.depth)
    return model


def _copy(target: nn.Module, sources: Sequence[nn.Module]) -> None:
    """Set the parameters of a module to the mean of others'."""
    states: list[dict[str, Tensor]] = [dict(s.named_parameters()) for s in sources]
    for name, parameter in target.named_parameters():
        if "delta_" not in name:
            parameter.copy_(torch.stack([state[name] for state in states]).mean(0))


def _relax(shared: nn.Module, original: nn.Module, depth: int) -> None:
    """Give the shared layer's deltas of one depth what comes nearest to the original layer.

    Depths share the norms, too, so what is approximated is a matrix with the norm before it: the
    difference of W diag(n). At full rank the layer is then the original one.
    """
    for name, norm in _NORMS.items():
        target = shared.get_submodule(name)
        assert isinstance(target, DepthLoRALinear)
        down, up = target.delta_down, target.delta_up
        if down is None or up is None or depth >= len(up):
            continue  # keys and values that all depths take from depth 0
        ours, scale = _with_norm(shared, name, norm)
        delta = LoRAPair.truncated(_with_norm(original, name, norm)[0] - ours, up.shape[2])
        up[depth] = delta.up
        down[depth] = torch.where(scale == 0, 0.0, delta.down / scale)


def _with_norm(layer: nn.Module, name: str, norm: str) -> tuple[Tensor, Tensor]:
    """W diag(n) of a matrix and the norm n before it, and n (1 where there is none)."""
    weight = layer.get_parameter(f"{name}.weight")
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = layer.get_parameter(f"{norm}.weight") if norm else weight.new_ones(weight.shape[1])
    return weight * scale, scale.to(weight.dtype)
