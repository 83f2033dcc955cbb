"""Which layer of the shared block runs when, and which donor layer it comes from.

Pure functions of the configuration: the model, the cost model, the engine and the converters all
read the same map (arXiv 2507.10524, Table 1).
"""

import random
from typing import Literal, NamedTuple

from mor.errors import ConfigError
from mor.model.config import Sharing

Initialization = Literal["stepwise", "lower", "upper", "random", "average"]

UNSHARED = -1
"""The depth of prelude and coda layers, which every token passes exactly once."""


class LayerKey(NamedTuple):
    """Where one application of one layer keeps its keys and values.

    A shared layer runs at several depths and needs a place for each; the caller of the layer says
    which. Prelude layers are (UNSHARED, 0..), coda layers follow them.
    """

    depth: int
    layer: int


def block_schedule(sharing: Sharing, num_block_layers: int, num_recursions: int) -> list[LayerKey]:
    """The applications of the block's layers in order.

    `cycle` runs the whole block R times: (1 2 3)(1 2 3)..; `sequence` runs each layer R times
    before the next: 1 1 2 2 3 3.
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
    """For each block layer, the layers of a plain donor that it starts from (averaged if several).

    Prelude and coda take the donor's first and last layers; the block draws on what is between.
    `stepwise` takes evenly spaced layers, `lower` and `upper` the first and last ones, `random` a
    sorted draw, `average` the mean of all layers that a block layer stands for.

    Raises:
        ConfigError: the donor has too few layers.
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
    """For each application of the block's layers the layer of a plain donor that it stands for.

    Args:
        first, last: the donor's middle is its layers first .. last - 1.
    """
    applications = block_schedule(sharing, num_block_layers, num_recursions)
    spaced = _evenly_spaced(first, last - 1, len(applications))
    return dict(zip(applications, spaced, strict=True))


def _evenly_spaced(start: int, stop: int, count: int) -> list[int]:
    """`count` integers from `start` to `stop`, both included."""
    if count == 1:
        return [start]
    return [round(start + i * (stop - start) / (count - 1)) for i in range(count)]
