"""The order in which the shared layers run, and the vanilla layers that they are initialized from.

Pure functions of the configuration, used by model, cost model, engine and converters alike. The
ways of sharing: MoR, arXiv 2507.10524, section 2.1 and Table 1; the ways of initializing: Relaxed
Recursive Transformers, arXiv 2410.20672, section 2.2.
"""

import random
from typing import Literal, NamedTuple

from mor.errors import ConfigError
from mor.model.config import MoRConfig, Sharing

Initialization = Literal["stepwise", "lower", "upper", "random", "average"]

UNSHARED = -1
"""The depth of prelude and coda layers, which every token passes exactly once."""


class LayerKey(NamedTuple):
    """The key of a KV cache: one layer at one depth.

    A plain Transformer indexes its cache by the layer alone (`layer_idx` in transformers). A shared
    layer runs at several depths and may have keys and values at each, so the caller says which.
    """

    depth: int
    """0, 1, .. R - 1 in the block; UNSHARED in prelude and coda."""
    layer: int
    """Index in the block; in prelude and coda counted through both, prelude first."""


class RecursionSpec(NamedTuple):
    """What a scheduler has to know of a model's recursions."""

    max_passes: int
    """Passes of the block that a token can take: R, or 1 where `sharing='sequence'` runs all
    recursions of a layer in a row."""
    recursions_per_pass: int
    """Recursions that one pass counts for: 1, or R where one pass is all of them."""
    shared_kv: bool
    """Whether only the first pass writes keys and values."""
    depth_fractions: tuple[float, ...]
    """(R,) share of tokens expected at each depth, to estimate the pages of a prompt."""

    @classmethod
    def of(cls, config: MoRConfig) -> "RecursionSpec":
        """The recursions of models with this config."""
        is_one_pass = config.sharing == "sequence"
        return cls(
            max_passes=1 if is_one_pass else config.num_recursions,
            recursions_per_pass=config.num_recursions if is_one_pass else 1,
            shared_kv=not config.kv_policy.writes(1),
            depth_fractions=config.depth_capacities,
        )


def block_schedule(sharing: Sharing, num_block_layers: int, num_recursions: int) -> list[LayerKey]:
    """The (depth, layer) of each of the R * L layer calls in the block, in the order they run.

    For L = 3 and R = 2 the layers run as 0 1 2 0 1 2 (`cycle`) or as 0 0 1 1 2 2 (`sequence`).
    """
    if sharing == "cycle":
        return [LayerKey(r, i) for r in range(num_recursions) for i in range(num_block_layers)]
    return [LayerKey(r, i) for i in range(num_block_layers) for r in range(num_recursions)]


def source_layers(
    init: Initialization,
    *,
    sharing: Sharing,
    num_donor_layers: int,
    num_prelude_layers: int,
    num_block_layers: int,
    num_coda_layers: int,
    num_recursions: int,
    seed: int = 0,
) -> list[tuple[int, ...]]:
    """For each of the L block layers, the vanilla layers whose mean it is initialized with.

    Prelude and coda take the vanilla model's first and last layers; the block draws on the layers
    between. `stepwise` takes evenly spaced ones, `lower` and `upper` the first and last L, `random`
    a sorted sample of L, `average` all layers that a block layer replaces (`original_layers`).

    Args:
        num_donor_layers: layers of the vanilla model (the "donor").
        seed: of `random`.

    Raises:
        ConfigError: the vanilla model has too few layers.
    """
    first, last = num_prelude_layers, num_donor_layers - num_coda_layers  # middle: [first, last)
    needed = num_block_layers * (num_recursions if init == "average" else 1)
    if last - first < needed:
        raise ConfigError(
            f"the donor has {num_donor_layers} layers, {max(0, last - first)} of them in the "
            f"middle, but init={init!r} of num_block_layers={num_block_layers} with "
            f"num_recursions={num_recursions} needs {needed}: make the block smaller."
        )
    if init == "lower":
        return [(first + i,) for i in range(num_block_layers)]
    if init == "upper":
        return [(last - num_block_layers + i,) for i in range(num_block_layers)]
    if init == "random":
        drawn = random.Random(seed).sample(range(first, last), num_block_layers)
        return [(i,) for i in sorted(drawn)]
    if init == "stepwise":
        return [(i,) for i in _evenly_spaced(first, last - 1, num_block_layers)]
    stands_for = original_layers(sharing, num_block_layers, num_recursions, first, last)
    return [
        tuple(donor for layer_key, donor in stands_for.items() if layer_key.layer == i)
        for i in range(num_block_layers)
    ]


def original_layers(
    sharing: Sharing, num_block_layers: int, num_recursions: int, first: int, last: int
) -> dict[LayerKey, int]:
    """For each call of a shared layer the vanilla layer that it replaces, evenly spaced.

    Args:
        first, last: the vanilla layers first, .. last - 1 are replaced by the block.
    """
    applications = block_schedule(sharing, num_block_layers, num_recursions)
    spaced = _evenly_spaced(first, last - 1, len(applications))
    return dict(zip(applications, spaced, strict=True))


def _evenly_spaced(start: int, stop: int, count: int) -> list[int]:
    """`count` integers from `start` to `stop`, both included, as equally far apart as can be."""
    if count == 1:
        return [start]
    return [round(start + i * (stop - start) / (count - 1)) for i in range(count)]
