"""Which shared layer runs when, and which donor layers it starts from."""

from collections import Counter
from itertools import pairwise
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.errors import ConfigError
from mor.model.sharing import Initialization, LayerKey, block_schedule, source_layers

INITS = get_args(Initialization)


def test_the_papers_table() -> None:
    """Table 1: nine applications of three layers."""
    layers = {
        s: [layer_key.layer for layer_key in block_schedule(s, 3, 3)] for s in ("cycle", "sequence")
    }
    assert layers == {
        "cycle": [0, 1, 2, 0, 1, 2, 0, 1, 2],
        "sequence": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    }
    depths = {
        s: [layer_key.depth for layer_key in block_schedule(s, 3, 3)] for s in ("cycle", "sequence")
    }
    assert depths == {
        "cycle": [0, 0, 0, 1, 1, 1, 2, 2, 2],
        "sequence": [0, 1, 2, 0, 1, 2, 0, 1, 2],
    }


@pytest.mark.parametrize("sharing", ["cycle", "sequence"])
@given(layers=st.integers(1, 6), recursions=st.integers(1, 5))
def test_every_layer_runs_once_per_depth_and_depths_only_rise(
    sharing: str, layers: int, recursions: int
) -> None:
    schedule = block_schedule(sharing, layers, recursions)
    every = {LayerKey(r, i) for r in range(recursions) for i in range(layers)}
    assert Counter(schedule) == Counter(every)
    for i in range(layers):
        assert [s.depth for s in schedule if s.layer == i] == list(range(recursions))


def drawn(init: str, **changes: Any) -> list[tuple[int, ...]]:
    """Donor layers of a block of two layers run three times, between one prelude and one coda."""
    shape: dict[str, Any] = {
        "sharing": "cycle",
        "num_donor_layers": 14,
        "num_prelude_layers": 1,
        "num_block_layers": 2,
        "num_coda_layers": 1,
        "num_recursions": 3,
    }
    return source_layers(init, **{**shape, **changes})


@pytest.mark.parametrize(
    ("init", "changes", "expected"),
    [
        ("lower", {}, [(1,), (2,)]),
        ("upper", {}, [(11,), (12,)]),
        ("stepwise", {}, [(1,), (12,)]),
        ("stepwise", {"num_block_layers": 4}, [(1,), (5,), (8,), (12,)]),
        ("stepwise", {"num_block_layers": 1}, [(1,)]),
        ("stepwise", {"num_prelude_layers": 0, "num_coda_layers": 0}, [(0,), (13,)]),
        ("lower", {"num_prelude_layers": 3}, [(3,), (4,)]),
        ("upper", {"num_coda_layers": 3}, [(9,), (10,)]),
        ("average", {"num_donor_layers": 8}, [(1, 3, 5), (2, 4, 6)]),
        ("average", {"num_donor_layers": 8, "sharing": "sequence"}, [(1, 2, 3), (4, 5, 6)]),
    ],
)
def test_by_hand(init: str, changes: dict[str, Any], expected: list[tuple[int, ...]]) -> None:
    assert drawn(init, **changes) == expected


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "sharing": draw(st.sampled_from(["cycle", "sequence"])),
        "num_prelude_layers": draw(st.integers(0, 2)),
        "num_block_layers": draw(st.integers(1, 5)),
        "num_coda_layers": draw(st.integers(0, 2)),
        "num_recursions": draw(st.integers(1, 4)),
    }
    unshared = shape["num_prelude_layers"] + shape["num_coda_layers"]
    minimum = shape["num_block_layers"] * shape["num_recursions"]
    shape["num_donor_layers"] = unshared + minimum + draw(st.integers(0, 7))
    return shape


@pytest.mark.parametrize("init", INITS)
@given(shape=shapes(), seed=st.integers(0, 9))
def test_the_block_draws_on_distinct_middle_layers(
    init: str, shape: dict[str, Any], seed: int
) -> None:
    sources = source_layers(init, seed=seed, **shape)
    assert len(sources) == shape["num_block_layers"]
    first, last = shape["num_prelude_layers"], shape["num_donor_layers"] - shape["num_coda_layers"]
    each = shape["num_recursions"] if init == "average" else 1
    assert all(len(source) == each for source in sources)
    flat = [layer for source in sources for layer in source]
    assert len(set(flat)) == len(flat)
    assert all(first <= layer < last for layer in flat)
    if init != "average":
        assert flat == sorted(flat)
    assert source_layers(init, seed=seed, **shape) == sources


@given(shape=shapes())
def test_averages_partition_a_middle_of_the_right_size(shape: dict[str, Any]) -> None:
    """With L * R middle layers, block layer l is the mean of those that it replaces."""
    layers, loops = shape["num_block_layers"], shape["num_recursions"]
    first = shape["num_prelude_layers"]
    shape["num_donor_layers"] = first + layers * loops + shape["num_coda_layers"]
    sources = source_layers("average", **shape)
    assert sorted(layer for source in sources for layer in source) == list(
        range(first, first + layers * loops)
    )
    step = layers if shape["sharing"] == "cycle" else 1
    assert all(b - a == step for source in sources for a, b in pairwise(source))


def test_random_goes_by_its_seed() -> None:
    draws = [drawn("random", seed=seed) for seed in range(8)]
    assert draws[3] == drawn("random", seed=3)
    assert len({tuple(d) for d in draws}) > 4


@pytest.mark.parametrize("init", INITS)
def test_a_donor_that_is_too_small_is_refused(init: str) -> None:
    needed = 6 if init == "average" else 2
    assert len(drawn(init, num_donor_layers=needed + 2)) == 2
    for layers in (needed + 1, 1):
        middle = max(0, layers - 2)
        words = rf"donor has {layers} layers, {middle} .*init='{init}' .*num_block_layers=2 .*needs"
        with pytest.raises(ConfigError, match=rf"{words} {needed}: make the block smaller"):
            drawn(init, num_donor_layers=layers)
