"""Starting a recursive model from a plain one (arXiv 2507.10524, appendix on uptraining)."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mor.errors import ConfigError
from mor.model.config import MoRConfig
from mor.model.mor import MoRModel
from mor.model.sharing import Initialisation, donor_layers

_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps", "tie_word_embeddings"),
)


@torch.no_grad()
def from_donor(
    donor: MoRModel, config: MoRConfig, init: Initialisation = "stepwise", seed: int = 0
) -> MoRModel:
    """A model of `config` whose layers start from a vanilla donor's.

    Embedding, final norm and head are the donor's; prelude and coda start from its first and last
    layers, the block from its middle layers as `donor_layers` says; routers start at random.

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
    sources = donor_layers(
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
    return model


def _copy(target: nn.Module, sources: Sequence[nn.Module]) -> None:
    """Set the parameters of a module to the mean of others'."""
    states: list[dict[str, Tensor]] = [dict(s.named_parameters()) for s in sources]
    for name, parameter in target.named_parameters():
        parameter.copy_(torch.stack([state[name] for state in states]).mean(0))
