"""Shapes of the models that go by a name: `MoRConfig.preset("360m")`."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from mor.errors import ConfigError, nearest


class Shape(NamedTuple):
    """What a named vanilla Transformer consists of."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


# The paper's shapes (arXiv 2507.10524, appendix; SmolLM's): vocabulary 49K, head size 64.
PRESETS: Mapping[str, Shape] = MappingProxyType(
    {
        "135m": Shape(30, 576, 9, 3, 1536),
        "360m": Shape(32, 960, 15, 5, 2560),
        "730m": Shape(26, 1536, 24, 8, 4096),
        "1.7b": Shape(24, 2048, 32, 32, 8192),
        "demo": Shape(8, 128, 2, 2, 384),  # ours, for two CPU cores and five minutes
    }
)


def preset_fields(name: str, num_recursions: Any) -> dict[str, Any]:
    """The fields of the config that a preset with this many recursions sets.

    A recursive model takes one layer for the prelude and one for the coda; the block gets
    ceil((layers - 2) / R) of the others, so that R passes do at least the preset's work.

    Raises:
        ConfigError: there is no such preset, or `num_recursions` is no integer >= 1.
    """
    if name.lower() not in PRESETS:
        raise ConfigError(f"preset {name!r} is unknown: {nearest(name.lower(), PRESETS)}")
    if type(num_recursions) is not int or num_recursions < 1:
        raise ConfigError(f"num_recursions={num_recursions!r} must be an integer >= 1.")
    shape = PRESETS[name.lower()]
    layers, vanilla = shape.num_layers, num_recursions == 1
    return {
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": 64,
        "intermediate_size": shape.intermediate_size,
        "num_prelude_layers": 0 if vanilla else 1,
        "num_block_layers": layers if vanilla else math.ceil((layers - 2) / num_recursions),
        "num_coda_layers": 0 if vanilla else 1,
        "num_recursions": num_recursions,
        "routing": "none" if vanilla else "expert_choice",
        "twin_num_layers": layers,
    }
