"""Variants that no golden file has: our models under the reference's names, and back.

The names follow the README of the golden files and are written down here once more, so that a
mistake in `mor.io.reference_checkpoint` cannot hide.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mor.errors import CheckpointError
from mor.io.reference_checkpoint import from_official
from mor.model.transformer import MoRModel
from tiny import build, tiny_config

ENDS: dict[str, Any] = {"num_prelude_layers": 0, "num_coda_layers": 0}
TOKEN: dict[str, Any] = {"routing": "token_choice"}
VARIANTS: dict[str, dict[str, Any]] = {
    "expert_r4_uneven": {"num_recursions": 4, "capacities": (1.0, 0.9, 0.35, 0.1)},
    "expert_first_depth_drops": {"capacities": (0.8, 0.5, 0.5)},
    "expert_tanh": {"router_activation": "tanh", "router_alpha": 0.7},
    "expert_no_activation": {"router_activation": "none", "selection_training": "none"},
    "expert_mlp": {"router_type": "mlp"},
    "expert_mlp_aux_router": {"router_type": "mlp", "selection_training": "aux_router"},
    "expert_additive": {"gating": "additive", "aux_loss_coeff": 0.02},
    "expert_hot": {"router_temperature": 2.5},
    "expert_cycle": ENDS,
    "expert_cycle_aux_router": {**ENDS, "selection_training": "aux_router"},
    "expert_shared_z": {"kv_strategy": "shared", "z_loss_coeff": 0.003},
    "expert_untied": {"tie_word_embeddings": False},
    "token_sigmoid": {**TOKEN, "router_activation": "sigmoid", "router_alpha": 0.4},
    "token_loss_free": {**TOKEN, "balancing": "loss_free", "balancing_update_rate": 0.02},
    "token_cycle": {**TOKEN, **ENDS},
    "token_cycle_loss_free": {**TOKEN, **ENDS, "balancing": "loss_free", "num_recursions": 2},
    "token_mlp": {**TOKEN, "router_type": "mlp"},
    "token_shared_z": {**TOKEN, "kv_strategy": "shared", "z_loss_coeff": 0.004},
    "token_additive": {**TOKEN, "gating": "additive", "balancing_coeff": 0.3},
    "token_unbalanced_hot": {**TOKEN, "balancing": "none", "router_temperature": 0.5},
}


def model_of(variant: str) -> MoRModel:
    model = build(tiny_config("expert", **VARIANTS[variant]), seed=len(variant))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "router" in name and ("up" in name or "down" in name):
                value.mul_(4)
    return model.train()


def router_names(ours: str, theirs: str, model: MoRModel) -> Iterator[tuple[str, str]]:
    if model.config.router_type == "linear":
        yield f"{ours}.proj.weight", f"{theirs}.router.weight"
    else:
        yield f"{ours}.up.weight", f"{theirs}.router.0.weight"
        yield f"{ours}.down.weight", f"{theirs}.router.2.weight"


def names(model: MoRModel) -> Iterator[tuple[str, str]]:
    """Our name and the reference's of every parameter, shared layers under all their names."""
    config = model.config
    first = config.num_prelude_layers  # 1 in the `middle_` sharings
    expert = config.routing == "expert_choice"
    for name in ("embed_tokens.weight", "norm.weight"):
        yield name, f"model.{name}"
    if not config.tie_word_embeddings:
        yield "lm_head.weight", "lm_head.weight"
    places = {"prelude.0": "model.layers.0"} if first else {}
    middle = config.num_recursions if expert else 1
    if config.num_coda_layers:
        places["coda.0"] = f"model.layers.{first + middle}"
    inside = [name for name, _ in model.block[0].named_parameters()]
    for ours, theirs in places.items():
        yield from ((f"{ours}.{name}", f"{theirs}.{name}") for name in inside)
    token = "model.layers.1" if first else "model.layers"
    for depth in range(config.num_recursions):
        unshared = (
            f"model.layers.{first + depth}.block" if expert else f"{token}.block_list.{depth}"
        )
        for i in range(config.num_block_layers):
            yield from ((f"block.{i}.{name}", f"{unshared}.{i}.{name}") for name in inside)
        if expert:
            wrapper = f"model.layers.{first + depth}"
            yield from router_names(f"router.routers.{depth}", f"{wrapper}.mor_router", model)
        if config.selection_training == "aux_router":
            yield from router_names(f"router.aux_routers.{depth}", f"{wrapper}.mlp_router", model)
    if not expert:
        yield from router_names("router.router", f"{token}.mor_router", model)
    if config.balancing == "loss_free":
        yield "router.bias", f"{token}.router_bias"


def under_their_names(model: MoRModel, once: bool) -> dict[str, Tensor]:
    """The state under the reference's names; tied parameters once, or under every name."""
    state, renamed, seen = model.state_dict(), dict[str, Tensor](), set[str]()
    for ours, theirs in names(model):
        if not once or ours not in seen:
            renamed[theirs] = state[ours].clone()
        seen.add(ours)
    expected = set(state) - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    assert seen == expected
    return renamed


def their_configs(model: MoRModel, router_type: str | None = None) -> tuple[dict, dict]:
    """The Llama config and the reference's own one."""
    config = model.config
    expert = config.routing == "expert_choice"
    llama = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "num_hidden_layers": config.num_hidden_layers,
        "use_cache": False,
    }
    activation = None if config.router_activation == "none" else config.router_activation
    own = {"router_func": activation, "alpha": config.router_alpha, "gating": config.gating}
    trained = None if config.selection_training == "none" else config.selection_training
    balancing = None if config.balancing == "none" else config.balancing
    choice = {
        "expert": own | {"sampling": trained, "coeff": config.aux_loss_coeff},
        "token": own
        | {"balancing": balancing, "coeff": config.balancing_coeff}
        | {"u": config.balancing_update_rate},
    }
    mor = {
        "enable": True,
        "type": "expert" if expert else "token",
        "capacity": ",".join(map(str, config.depth_capacities)),
        "rand_router": False,
        "router_type": router_type or config.router_type,
        "z_loss": config.z_loss_coeff > 0,
        "z_coeff": config.z_loss_coeff or 0.001,
        "temp": config.router_temperature,
        **choice,
    }
    sharing = ("middle_" if config.num_prelude_layers else "") + config.sharing
    recursive = {"enable": True, "num_recursion": config.num_recursions, "sharing": sharing}
    shared = {"enable": config.kv_strategy == "shared", "update_cache": False}
    return llama, {"recursive": recursive, "kv_sharing": shared, "mor": mor}


@pytest.mark.parametrize("once", [True, False], ids=["once", "every_name"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_comes_back_from_the_references_names(variant: str, once: bool) -> None:
    model = model_of(variant)
    llama, cfg = their_configs(model)
    again = from_official(under_their_names(model, once), llama, cfg).train()
    expected = dataclasses.replace(model.config, twin_num_layers=model.config.num_hidden_layers)
    assert again.config == expected
    ids = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(5))
    ours, theirs = model(ids, labels=ids), again(ids, labels=ids)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.recursion_counts, theirs.recursion_counts)
    assert torch.equal(ours.total_loss, theirs.total_loss)
    assert ours.recursion_counts.unique().numel() > 1  # the routers really split the tokens
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("variant", ["expert_mlp", "token_mlp"])
def test_wide_mlp_is_mlp(variant: str) -> None:
    model = model_of(variant)
    llama, cfg = their_configs(model, router_type="wide_mlp")
    again = from_official(under_their_names(model, once=True), llama, cfg)
    assert again.config.router_type == "mlp"
    ids = torch.arange(24)[None]
    assert torch.equal(again.train()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("variant", ["expert_cycle", "token_loss_free"])
def test_what_wrappers_and_buffers_add_is_passed_over(variant: str) -> None:
    model = model_of(variant)
    state = {f"module.{k}": v for k, v in under_their_names(model, once=True).items()}
    state["module.model.rotary_emb.inv_freq"] = torch.ones(3)
    again = from_official(state, *their_configs(model)).train()
    ids = torch.arange(24)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("variant", "lost"),
    [
        ("token_cycle_loss_free", "router.bias"),
        ("expert_mlp_aux_router", r"router.aux_routers.2.down.weight"),
        ("expert_untied", "lm_head.weight"),
        ("expert_r4_uneven", "block.1.mlp.up_proj.weight"),
    ],
)
def test_what_is_lacking_is_named_as_ours(variant: str, lost: str) -> None:
    model = model_of(variant)
    state = under_their_names(model, once=False)
    for ours, theirs in names(model):
        if ours == lost:
            del state[theirs]
    with pytest.raises(CheckpointError, match=rf"lacks a parameter for '{lost}'"):
        from_official(state, *their_configs(model))


def test_names_of_another_routing_are_refused() -> None:
    expert, token = model_of("expert_cycle"), model_of("token_cycle")
    state = under_their_names(token, once=False)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.block_list\.0\.0\..*expert_choice"):
        from_official(state, *their_configs(expert))
