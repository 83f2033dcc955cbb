"""Initialize a recursive model from a vanilla one, to be trained further ("uptrained").

arXiv 2507.10524, appendix on uptraining; arXiv 2410.20672, sections 2.2 and 2.3.
"""

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

_EQUAL_FIELDS = (  # what both configs must agree in
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rms_norm_eps",
    "qk_norm",
    "tie_word_embeddings",
)

_NORMS: Mapping[str, str] = MappingProxyType(
    {  # matrix of a layer -> the norm of its input, "" for none
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
    """A model of `config` whose layers are initialized from a vanilla model, the "donor".

    Embedding, final norm and head are copied; prelude and coda from its first and last layers, the
    block from its middle layers as `source_layers` says; routers are drawn at random. With
    `relaxation_rank` the LoRA pairs of each depth are the truncated singular value decomposition of
    the difference between the layer that is replaced there and the shared one.

    Args:
        seed: of the sample of layers with `init='random'`.

    Raises:
        ConfigError: the donor is not vanilla, has other widths, or too few layers.
    """
    if donor.config.num_recursions != 1:
        raise ConfigError(
            f"the donor has num_recursions={donor.config.num_recursions}: only a vanilla model "
            "has layers of its own to give."
        )
    for name in _EQUAL_FIELDS:
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
    # A block layer is the mean of its sources; with one source, a copy.
    for layer, drawn in zip(model.block, sources, strict=True):
        _copy(layer, [layers[i] for i in drawn])
    if config.relaxation_rank:  # after the copies: pairs are differences from the shared layers
        last = len(layers) - config.num_coda_layers
        shape = config.sharing, config.num_block_layers, config.num_recursions
        for layer_key, i in original_layers(*shape, config.num_prelude_layers, last).items():
            _set_loras(model.block[layer_key.layer], layers[i], layer_key.depth)
    return model


def _copy(target: nn.Module, sources: Sequence[nn.Module]) -> None:
    """Set the parameters of a module, LoRA pairs aside, to the mean of others'."""
    states: list[dict[str, Tensor]] = [dict(s.named_parameters()) for s in sources]
    for name, parameter in target.named_parameters():
        if "delta_" not in name:
            parameter.copy_(torch.stack([state[name] for state in states]).mean(0))


def _set_loras(shared: nn.Module, original: nn.Module, depth: int) -> None:
    """Set the LoRA pairs of one depth so that the shared layer comes nearest to the original one.

    Depths share the norms, too, so it is W diag(n), a matrix with the norm n of its input, whose
    difference the pair B A diag(n) approximates. At full rank the layer is then the original one,
    but for the norms of queries and keys (`qk_norm`), which stay those of the shared layer.
    """
    for name, norm in _NORMS.items():
        target = shared.get_submodule(name)
        assert isinstance(target, DepthLoRALinear)
        down, up = target.delta_down, target.delta_up
        if down is None or up is None or depth >= len(up):
            continue  # deeper depths neither compute keys nor values
        ours, scale = _with_norm(shared, name, norm)
        pair = LoRAPair.truncated(_with_norm(original, name, norm)[0] - ours, up.shape[2])
        up[depth] = pair.up
        # A diag(n) was found, A is wanted; where n is 0 the input is 0 and A is free.
        down[depth] = torch.where(scale == 0, 0.0, pair.down / scale)


def _with_norm(layer: nn.Module, name: str, norm: str) -> tuple[Tensor, Tensor]:
    """(out, in) W diag(n) and (in,) n, the weight of the norm before it, 1 where there is none."""
    weight = layer.get_parameter(f"{name}.weight")
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = layer.get_parameter(f"{norm}.weight") if norm else weight.new_ones(weight.shape[1])
    return weight * scale, scale.to(weight.dtype)
