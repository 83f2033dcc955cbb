"""The cost arithmetic against real modules, torch's FLOP counter and a real cache."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mor.errors import ConfigError
from mor.model.config import MoRConfig
from mor.model.cost import (
    activation_values_per_token,
    decode_flops,
    depth_fractions_of,
    kv_bytes_per_token,
    num_layer_parameters,
    num_lora_parameters,
    num_parameters,
    num_parameters_non_embedding,
    num_router_parameters,
    sequence_flops,
    training_flops,
)
from mor.model.generation import RaggedKVCache, batch_new_tokens
from mor.model.transformer import MoRModel, MoROutput
from tiny import KINDS, build, configs, tiny_config, tiny_model

CPU = torch.device("cpu")
TIME = 40  # every capacity of every kind takes a whole number of these tokens, or of TIME + 8


def ids(seed: int, time: int) -> torch.Tensor:
    return torch.randint(0, 61, (1, time), generator=torch.Generator().manual_seed(seed))


def measured_presence(out: MoROutput, num_recursions: int) -> tuple[float, ...]:
    """Share of tokens at each depth of one forward pass."""
    counts = out.recursion_counts
    return tuple(float((counts > r).double().mean()) for r in range(num_recursions))


# Parameters


@given(config=configs())
def test_parameters_are_those_of_the_module(config: MoRConfig) -> None:
    model = MoRModel(config)
    count = {name: p.numel() for name, p in model.named_parameters()}  # tied ones come once
    assert num_parameters(config) == sum(count.values())
    inner = {n: c for n, c in count.items() if not n.startswith(("embed_tokens", "lm_head"))}
    assert num_parameters_non_embedding(config) == sum(inner.values())
    assert num_router_parameters(config) == sum(
        c for n, c in count.items() if n.startswith("router")
    )
    loras = sum(c for n, c in count.items() if "delta_" in n)
    assert num_lora_parameters(config) == loras
    one = sum(c for n, c in count.items() if n.startswith("block.0.") and "delta_" not in n)
    assert num_layer_parameters(config) == one


# FLOPs


def counted_flops(model: MoRModel, batch: torch.Tensor) -> tuple[float, MoROutput]:
    """FLOPs per token that torch counts, and what the pass gave.

    torch does not count its fused CPU attention, so the plain one is forced; that repeats the keys
    of a group (enable_gqa), which moves bytes and adds no FLOPs.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        out = model(batch, selection="topk")
    return counter.get_total_flops() / batch.numel(), out


def with_last_token_everywhere(model: MoRModel, time: int) -> torch.Tensor:
    """A sequence whose last token takes all recursions.

    Shared keys are read up to the deepest query, so only then is the whole square computed.
    """
    for seed in range(200):
        batch = ids(seed, time)
        if model(batch, selection="topk").recursion_counts[0, -1] == model.config.num_recursions:
            return batch
    raise AssertionError("no such sequence in 200")


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_that_torch_counts(kind: str) -> None:
    """Exactly: projections, attention over the full square, routers (auxiliary too) and head."""
    model = tiny_model(kind)
    time = TIME if kind == "expert_bare" else TIME + 8
    counted, out = counted_flops(model, with_last_token_everywhere(model, time))
    depth_fractions = measured_presence(out, model.config.num_recursions)
    if model.config.routing == "expert_choice":
        assert depth_fractions == pytest.approx(model.config.depth_capacities)
    cost = sequence_flops(model.config, time, depth_fractions=depth_fractions, causal=False)
    assert cost.mean == pytest.approx(counted, rel=1e-9)
    assert cost.depth_fractions == depth_fractions


def test_grouped_queries_cost_what_plain_heads_cost() -> None:
    flops = {}
    for groups in (1, 2, 4):
        model = tiny_model("vanilla", num_key_value_heads=groups)
        flops[groups], _ = counted_flops(model, ids(0, 16))
        layer = 2 * 24 * 6 * 2 * groups * model.config.num_hidden_layers  # k_proj and v_proj
        flops[groups] -= layer
    assert flops[1] == flops[2] == flops[4]


def test_causal_attention_is_half_the_square() -> None:
    config = tiny_config("recursive")
    causal, full = (sequence_flops(config, 33, causal=c) for c in (True, False))
    layers = config.num_hidden_layers
    assert full.mean - causal.mean == pytest.approx(layers * 4 * 24 * (33 - 17))
    assert causal.head == full.head == 2 * 61 * 24


@given(config=configs(), length=st.integers(1, 64))
def test_decoding_a_sequence_costs_what_its_prefill_costs(config: MoRConfig, length: int) -> None:
    """Summed over positions, but for a token's view of itself, which depends on the rounding."""
    prefill = sequence_flops(config, length)
    steps = [decode_flops(config, t) for t in range(1, length + 1)]
    mean = sum(s.mean for s in steps) / length
    per_key = 4 * 24 * config.num_block_layers
    shared = config.kv_strategy == "shared"
    itself = [0.0 if shared else p * (1 - p) / 2 for p in prefill.depth_fractions]
    assert mean == pytest.approx(prefill.mean - per_key * sum(itself))
    assert steps[0].head == prefill.head
    assert steps[0].routing == prefill.routing


@given(config=configs(), length=st.integers(1, 64))
def test_a_token_that_goes_deeper_costs_more(config: MoRConfig, length: int) -> None:
    cost = sequence_flops(config, length)
    costs = [cost.for_recursions(r) for r in range(config.num_recursions + 1)]
    assert costs[0] == cost.unshared + cost.head
    assert all(a < b for a, b in pairwise(costs))
    assert costs[0] < cost.mean <= costs[-1] + cost.routing
    assert training_flops(config, length) == 3 * cost.mean
    nobody_leaves = sequence_flops(config, length, depth_fractions=(1.0,) * config.num_recursions)
    assert cost.mean <= nobody_leaves.mean * (1 + 1e-12)
    assert nobody_leaves.mean == pytest.approx(nobody_leaves.for_recursions(config.num_recursions))


def test_routers_are_paid_for_by_tokens_that_leave() -> None:
    config = tiny_config("expert", capacities=(0.5, 0.25, 0.25))
    cost = sequence_flops(config, 8)
    assert cost.routing == pytest.approx(2 * 24 * (0.5 + 0.25 + 0))
    twice = sequence_flops(
        tiny_config("expert", capacities=(0.5, 0.25, 0.25), selection_training="aux_router"), 8
    )
    assert twice.routing == 2 * cost.routing


# Keys and values


class Weighed(RaggedKVCache):
    """A ragged cache that knows how many bytes of keys and values it holds."""

    @property
    def num_bytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v, _ in self._kept.values())


def check_cache_bytes(model: MoRModel, time: int, seed: int) -> None:
    cache = Weighed(model.config, 1)
    context = model.context(batch_new_tokens([0], [time], CPU), cache)
    with torch.no_grad():
        x = model.run_prelude(model.embed_tokens(ids(seed, time)[0]), context)
        x, counts, _ = model.run_recursions(x, context, "threshold")
        model.run_coda(x, context)
    histogram = torch.bincount(counts, minlength=model.config.num_recursions + 1).tolist()
    depth_fractions = depth_fractions_of(model.config, histogram)
    expected = kv_bytes_per_token(model.config, depth_fractions=depth_fractions, bytes_per_value=8)
    assert cache.num_bytes / time == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_kv_bytes_are_those_of_a_real_cache(kind: str) -> None:
    check_cache_bytes(tiny_model(kind), 31, seed=1)


@given(config=configs(), seed=st.integers(0, 99), time=st.integers(1, 20))
def test_kv_bytes_of_any_config(config: MoRConfig, seed: int, time: int) -> None:
    check_cache_bytes(build(config, seed), time, seed)


def test_kv_bytes_by_hand() -> None:
    """2 outer layers and 2 block layers at presences 1 + 2/3 + 1/3; 2 groups of 6; 2 bytes."""
    assert kv_bytes_per_token(tiny_config("expert")) == pytest.approx((2 + 2 * 2) * 2 * 12 * 2)
    assert kv_bytes_per_token(tiny_config("expert_shared")) == (2 + 2) * 2 * 12 * 2
    assert kv_bytes_per_token(tiny_config("recursive")) == (2 + 6) * 2 * 12 * 2


# Presence


def test_presence_follows_the_configuration_or_a_histogram() -> None:
    config = tiny_config("expert")
    assert depth_fractions_of(config) == config.capacities
    assert depth_fractions_of(tiny_config("token")) == pytest.approx((1, 2 / 3, 1 / 3))
    assert depth_fractions_of(tiny_config("recursive")) == (1, 1, 1)
    assert depth_fractions_of(config, [2, 1, 1]) == (1.0, 0.5, 0.25)
    assert depth_fractions_of(config, [4, 2, 1, 1]) == (0.5, 0.25, 0.125)
    assert depth_fractions_of(config, [0.0, 0.5, 0.25, 0.25]) == (1.0, 0.5, 0.25)


@pytest.mark.parametrize("histogram", [[], [1, 1], [1] * 5, [0, 0, 0], [0, 0, 0, 0]])
def test_a_histogram_that_does_not_fit_is_refused(histogram: list[int]) -> None:
    words = f"histogram of {len(histogram)} entries does not fit num_recursions=3"
    with pytest.raises(ConfigError, match=words):
        depth_fractions_of(tiny_config("expert"), histogram)


def test_activations_shrink_with_presence() -> None:
    for kind in KINDS:
        config = tiny_config(kind)
        full = activation_values_per_token(config, [1.0] * config.num_recursions)
        layer = 4 * 24 + 2 * (4 + 2) * 6 + 2 * 40
        layer += (4 + 2) * 6 if config.qk_norm else 0  # before their norms
        assert full == config.num_hidden_layers * layer
        mean = sum(depth_fractions_of(config)) / config.num_recursions
        assert activation_values_per_token(config) <= full
        assert (activation_values_per_token(config) < full) == (mean < 1)
