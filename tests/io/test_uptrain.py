"""Initializing a recursive model from a vanilla donor."""

import dataclasses
from itertools import chain

import pytest
import torch

from mor.errors import ConfigError
from mor.io.uptrain import init_from_vanilla
from mor.model.config import MoRConfig
from mor.model.transformer import MoRModel
from tiny import build, tiny_config


def donor(num_layers: int = 8) -> MoRModel:
    config = tiny_config("vanilla", num_block_layers=num_layers)
    return build(dataclasses.replace(config, num_prelude_layers=0, num_coda_layers=0))


def weight(layer: torch.nn.Module) -> torch.Tensor:
    return layer.mlp.up_proj.weight


@pytest.mark.parametrize(
    ("init", "expected"), [("stepwise", [1, 6]), ("lower", [1, 2]), ("upper", [5, 6])]
)
def test_layers_come_from_where_they_should(init: str, expected: list[int]) -> None:
    plain = donor()
    model = init_from_vanilla(plain, tiny_config("expert"), init)
    assert torch.equal(weight(model.prelude[0]), weight(plain.block[0]))
    assert torch.equal(weight(model.coda[0]), weight(plain.block[7]))
    for layer, source in zip(model.block, expected, strict=True):
        assert torch.equal(weight(layer), weight(plain.block[source]))
    assert torch.equal(model.embed_tokens.weight, plain.embed_tokens.weight)
    assert torch.equal(model.norm.weight, plain.norm.weight)


def test_average_is_the_mean_of_the_layers_that_a_block_layer_stands_for() -> None:
    plain = donor()
    model = init_from_vanilla(plain, tiny_config("expert"), "average")
    for i, layer in enumerate(model.block):
        mean = sum(weight(plain.block[1 + i + 2 * r]) for r in range(3)) / 3
        torch.testing.assert_close(weight(layer), mean)


def test_a_donor_of_one_layer_per_pass_that_repeats_keeps_its_function() -> None:
    """If the donor's middle already repeats a block, the recursive model is the same function."""
    plain = donor()
    for i, r in ((i, r) for i in range(2) for r in range(3)):
        plain.block[1 + i + 2 * r].load_state_dict(plain.block[1 + i].state_dict())
    config = tiny_config("recursive")
    ids = torch.randint(0, 61, (1, 12), generator=torch.Generator().manual_seed(0))
    for init in ("average", "lower", "upper"):
        model = init_from_vanilla(plain, config, init).eval()
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)


def test_random_is_a_sorted_draw_that_the_seed_decides() -> None:
    plain = donor()

    def drawn(seed: int) -> list[int]:
        model = init_from_vanilla(plain, tiny_config("expert"), "random", seed)
        weights = [weight(layer) for layer in plain.block]
        return [
            next(i for i, w in enumerate(weights) if torch.equal(w, weight(layer)))
            for layer in model.block
        ]

    assert drawn(0) == drawn(0)
    assert all(a == sorted(a) and a[0] >= 1 and a[-1] <= 6 for a in map(drawn, range(5)))
    assert len(set(chain(*map(drawn, range(8))))) > 2


@pytest.mark.parametrize(
    ("change", "words"),
    [({"hidden_size": 48}, "hidden_size"), ({"num_block_layers": 9}, "needs 9")],
)
def test_what_cannot_work_is_refused(change: dict, words: str) -> None:
    config = MoRConfig.from_dict({**tiny_config("expert").to_dict(), **change})
    with pytest.raises(ConfigError, match=words):
        init_from_vanilla(donor(), config)


def test_a_recursive_donor_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_recursions=3"):
        init_from_vanilla(build(tiny_config("recursive")), tiny_config("expert"))
