"""A config either works or says which field is wrong, with which value, and what would be right."""

import dataclasses
import math
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.errors import ConfigError
from mor.model.config import MoRConfig
from mor.model.cost import num_parameters_non_embedding
from tiny import KINDS, SHAPE, configs, tiny_config

THIRDS = (1.0, 2 / 3, 1 / 3)
TOKEN = {"routing": "token_choice"}
NONE = {"routing": "none"}


def refusal(values: dict[str, Any]) -> str:
    """What the config says about values that cannot work."""
    with pytest.raises(ConfigError) as caught:
        MoRConfig.from_dict({**SHAPE, **values})
    return str(caught.value)


# Each rule: the fields that break it, then what the message must say: field, value, cure.
RULES: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5},
        ["hidden_size=24", "num_attention_heads=5", "give head_dim"],
    ),
    ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3", "same number"]),
    ({"head_dim": 5}, ["head_dim=5", "must be even"]),
    ({"bos_token_id": 61}, ["bos_token_id=61", "below vocab_size=61"]),
    ({"eos_token_id": 99}, ["eos_token_id=99", "below vocab_size=61"]),
    ({"pad_token_id": 61}, ["pad_token_id=61", "below vocab_size=61"]),
    ({"router_temperature": 0}, ["router_temperature=0", "1.0 is the paper's"]),
    (
        {"num_recursions": 1},
        ["routing='expert_choice'", "num_recursions >= 2", "set routing='none'"],
    ),
    ({"num_recursions": 1, **TOKEN}, ["routing='token_choice'", "set routing='none'"]),
    (
        {"num_recursions": 1, **NONE, "kv_strategy": "shared"},
        ["kv_strategy='shared'", "num_recursions >= 2"],
    ),
    ({"sharing": "sequence"}, ["routing='expert_choice'", "needs sharing='cycle'", "'sequence'"]),
    (
        {"router_activation": "softmax"},
        ["router_activation='softmax'", "'expert_choice'", "use 'sigmoid' or 'tanh' or 'none'"],
    ),
    (
        {**TOKEN, "router_activation": "tanh"},
        ["router_activation='tanh'", "'token_choice'", "use 'softmax' or 'sigmoid'"],
    ),
    ({"balancing": "loss"}, ["balancing='loss'", "'expert_choice'", "use 'none'"]),
    (
        {"router_type": "random", "selection_training": "aux_loss"},
        ["selection_training='aux_loss'", "router_type='random'", "use 'none'"],
    ),
    (
        {**TOKEN, "router_type": "random", "balancing": "loss_free"},
        ["balancing='loss_free'", "router_type='random'", "use 'none'"],
    ),
    (
        {**TOKEN, "selection_training": "aux_router"},
        ["selection_training='aux_router'", "'token_choice'", "use 'none'"],
    ),
    ({**NONE, "router_activation": "sigmoid"}, ["router_activation='sigmoid'", "use None"]),
    ({**NONE, "router_alpha": 0.1}, ["router_alpha=0.1", "routing='none'", "use None"]),
    ({**NONE, "selection_training": "aux_loss"}, ["selection_training='aux_loss'", "use 'none'"]),
    ({**NONE, "balancing": "loss"}, ["balancing='loss'", "routing='none'", "use 'none'"]),
    ({**NONE, "capacities": THIRDS}, ["capacities=(1.0,", "routing='none'", "use None"]),
    ({**TOKEN, "capacities": THIRDS}, ["capacities=(1.0,", "'token_choice'", "use None"]),
    ({**TOKEN, "thresholds": (0.0,) * 3}, ["thresholds=(0.0,", "'token_choice'", "use None"]),
    ({"capacities": (1.0, 0.5)}, ["capacities=(1.0, 0.5)", "num_recursions=3 numbers"]),
    ({"capacities": 0.5}, ["capacities=0.5", "num_recursions=3 numbers"]),
    ({"capacities": "1,1,1"}, ["capacities='1,1,1'", "num_recursions=3 numbers"]),
    ({"capacities": (1.0, "a", 0.5)}, ["capacities=(1.0, 'a', 0.5)", "3 numbers"]),
    ({"capacities": (True, 0.5, 0.2)}, ["capacities=(True, 0.5, 0.2)", "3 numbers"]),
    ({"capacities": (1.0, math.nan, 0.5)}, ["capacities=(1.0, nan, 0.5)", "3 numbers"]),
    ({"capacities": (1.0, 0.3, 0.4)}, ["capacities=(1.0, 0.3, 0.4)", "never grow with depth"]),
    ({"capacities": (1.0, 0.3, 0.0)}, ["capacities=(1.0, 0.3, 0.0)", "must lie in (0, 1]"]),
    ({"capacities": (1.5, 0.3, 0.1)}, ["capacities=(1.5, 0.3, 0.1)", "must lie in (0, 1]"]),
    (
        {"capacities": (0.9, 0.5, 0.1), "kv_strategy": "shared"},
        ["kv_strategy='shared'", "capacities[0]=1", "not 0.9"],
    ),
    ({"thresholds": (0.0,)}, ["thresholds=(0.0,)", "num_recursions=3 numbers"]),
    ({"thresholds": (0.0, math.inf, 0.0)}, ["thresholds=(0.0, inf, 0.0)", "3 numbers"]),
    ({"thresholds": (0.0, False, 0.0)}, ["thresholds=(0.0, False, 0.0)", "3 numbers"]),
]


@pytest.mark.parametrize(("values", "words"), RULES, ids=[f"{v}" for v, _ in RULES])
def test_a_broken_rule_is_named_with_its_cure(values: dict[str, Any], words: list[str]) -> None:
    message = refusal(values)
    for word in words:
        assert word in message


NUMBERS = ["rope_theta", "rms_norm_eps", "initializer_range", "router_alpha", "z_loss_coeff"]
COUNTS = {
    **dict.fromkeys(("vocab_size", "hidden_size", "num_block_layers", "num_recursions"), 1),
    **dict.fromkeys(("intermediate_size", "max_position_embeddings", "head_dim"), 1),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "twin_num_layers"), 1),
    **dict.fromkeys(("num_prelude_layers", "num_coda_layers", "eos_token_id"), 0),
}


@pytest.mark.parametrize(("name", "minimum"), COUNTS.items())
def test_counts_are_whole_numbers(name: str, minimum: int) -> None:
    for value in (minimum - 1, 1.5, True, "2", float("nan")):
        assert f"{name}={value!r} must be an integer >= {minimum}" in refusal({name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_finite_and_not_negative(name: str) -> None:
    for value in (-1.0, math.nan, math.inf, True, "0.1"):
        assert f"{name}={value!r} must be a finite number >= 0" in refusal({name: value})


def test_flags_are_true_or_false() -> None:
    for value in (0, 1, "yes", None):
        assert f"tie_word_embeddings={value!r} must be true or false" in refusal(
            {"tie_word_embeddings": value}
        )


@pytest.mark.parametrize(
    ("name", "value", "near"),
    [
        ("sharing", "cycles", "cycle"),
        ("routing", "expert", "expert_choice"),
        ("kv_strategy", "recursion", "recursion_wise"),
        ("router_type", "liner", "linear"),
        ("router_activation", "sigmod", "sigmoid"),
        ("selection_training", "aux", "aux_loss"),
        ("balancing", "lossfree", "loss_free"),
        ("gating", "weight", "weighted"),
    ],
)
def test_an_unknown_choice_names_the_nearest(name: str, value: str, near: str) -> None:
    message = refusal({name: value})
    assert message == f"{name}={value!r} is not a choice: did you mean {near!r}?"
    assert f"{name}=7" in refusal({name: 7})
    assert f"{name}=['{near}']" in refusal({name: [near]})


def test_a_choice_without_a_default_of_none_cannot_be_none() -> None:
    for name in ("sharing", "routing", "kv_strategy", "router_type", "gating"):
        assert f"{name}=None is not a choice" in refusal({name: None})


@pytest.mark.parametrize("values", [{}, {"preset": "360m"}])
def test_an_unknown_key_names_the_nearest(values: dict[str, Any]) -> None:
    for key, near in (("hiden_size", "hidden_size"), ("num_layers", "twin_num_layers")):
        with pytest.raises(ConfigError, match=rf"'{key}' is unknown: did you mean '{near}'\?"):
            MoRConfig.from_dict({**values, key: 1})
    for key in ("name", "cls", "xyzzy", 7, None):
        with pytest.raises(ConfigError, match=rf"{key!r} is unknown"):
            MoRConfig.from_dict({**values, key: 1})


# Presets


@pytest.mark.parametrize(
    ("recursions", "block", "millions"), [(1, 32, 315), (2, 15, 167), (3, 10, 118), (4, 8, 98)]
)
def test_the_360m_preset_has_the_papers_sizes(recursions: int, block: int, millions: int) -> None:
    config = MoRConfig.preset("360m", num_recursions=recursions)
    ends = 0 if recursions == 1 else 1
    assert config.num_block_layers == block
    assert (config.num_prelude_layers, config.num_coda_layers) == (ends, ends)
    assert config.routing == ("none" if recursions == 1 else "expert_choice")
    assert round(num_parameters_non_embedding(config) / 1e6) == millions


@pytest.mark.parametrize(
    ("name", "shape", "block"),
    [
        ("135m", (30, 576, 9, 3, 1536), 10),
        ("360m", (32, 960, 15, 5, 2560), 10),
        ("730m", (26, 1536, 24, 8, 4096), 8),
        ("1.7b", (24, 2048, 32, 32, 8192), 8),
    ],
)
def test_presets_have_the_papers_shapes(name: str, shape: tuple[int, ...], block: int) -> None:
    layers, hidden, heads, kv_heads, inner = shape
    for given_name in (name, name.upper()):
        config = MoRConfig.preset(given_name)
        assert (config.hidden_size, config.intermediate_size) == (hidden, inner)
        assert config.num_heads_and_dim == (heads, kv_heads, 64)
        assert (config.num_block_layers, config.num_recursions) == (block, 3)
        assert (config.vocab_size, config.max_position_embeddings) == (49152, 2048)
        twin = config.vanilla_twin()
        assert (twin.num_hidden_layers, twin.num_unique_layers) == (layers, layers)
        assert twin == dataclasses.replace(MoRConfig.preset(name, 1), twin_num_layers=None)


def test_a_preset_takes_other_fields_and_refuses_what_cannot_work() -> None:
    config = MoRConfig.from_dict(
        {"preset": "135m", "num_recursions": 2, "num_block_layers": 3, "routing": "token_choice"}
    )
    assert (config.num_block_layers, config.num_recursions) == (3, 2)
    assert (config.routing, config.hidden_size) == ("token_choice", 576)
    for name, near in (("360", "360m"), ("1.7", "1.7b"), ("730M ", "730m")):
        with pytest.raises(ConfigError, match=rf"preset '{name}' is unknown: did you mean '{near}"):
            MoRConfig.from_dict({"preset": name})
    for bad in (0, -2, "3", 2.0, True, None):
        with pytest.raises(ConfigError, match=rf"num_recursions={bad!r} must be an integer >= 1"):
            MoRConfig.from_dict({"preset": "360m", "num_recursions": bad})


# Values


@given(config=configs())
def test_plain_data_and_back(config: MoRConfig) -> None:
    plain = config.to_dict()
    assert MoRConfig.from_dict(plain) == config
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
    again = MoRConfig.from_dict(listed)
    assert again == config
    assert hash(again) == hash(config)
    assert isinstance(again.capacities, tuple | None)


@given(config=configs())
def test_derived_numbers_agree(config: MoRConfig) -> None:
    unshared = config.num_prelude_layers + config.num_coda_layers
    assert config.num_unique_layers == unshared + config.num_block_layers
    assert config.num_hidden_layers == unshared + config.num_recursions * config.num_block_layers
    shares = config.depth_capacities
    assert len(shares) == config.num_recursions
    assert list(shares) == sorted(shares, reverse=True)
    twin = config.vanilla_twin()
    assert twin.num_hidden_layers == config.num_hidden_layers
    assert (twin.routing, twin.num_recursions) == ("none", 1)
    assert twin.num_heads_and_dim == config.num_heads_and_dim


@given(config=configs(), field=st.sampled_from(dataclasses.fields(MoRConfig)))
def test_a_config_cannot_be_changed(config: MoRConfig, field: dataclasses.Field) -> None:
    before = config.to_dict()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field.name, getattr(config, field.name))
    config.to_dict()["vocab_size"] = 1
    assert config.to_dict() == before


def test_lists_become_tuples() -> None:
    config = tiny_config("expert", capacities=[1.0, 0.5, 0.25], thresholds=[0, -1.5, 2])
    assert config.capacities == (1.0, 0.5, 0.25)
    assert config.thresholds == (0, -1.5, 2)
    assert config.with_thresholds((0.0, 1.0, 2.0)).thresholds == (0.0, 1.0, 2.0)
    assert config.thresholds == (0, -1.5, 2)


def test_defaults_follow_the_routing() -> None:
    def resolved(kind: str) -> dict[str, Any]:
        plain = tiny_config(kind).to_dict()
        names = ("router_activation", "router_alpha", "selection_training", "balancing")
        return {name: plain[name] for name in (*names, "capacities", "thresholds")}

    nothing = dict.fromkeys(("capacities", "thresholds"))
    assert resolved("expert") == {
        "router_activation": "sigmoid",
        "router_alpha": 0.1,
        "selection_training": "aux_loss",
        "balancing": "none",
        "capacities": pytest.approx(THIRDS),
        "thresholds": (0.0, 0.0, 0.0),
    }
    assert resolved("token") == {
        "router_activation": "softmax",
        "router_alpha": 1.0,
        "selection_training": "none",
        "balancing": "loss",
        **nothing,
    }
    assert resolved("expert_random")["selection_training"] == "none"
    for kind in ("vanilla", "recursive"):
        off = {"router_activation": None, "router_alpha": None}
        assert resolved(kind) == off | nothing | {"selection_training": "none", "balancing": "none"}
    plain = MoRConfig(hidden_size=64, num_attention_heads=4)
    assert (plain.num_key_value_heads, plain.head_dim) == (4, 16)


def test_every_choice_of_every_field_is_reachable() -> None:
    """Each value that a field's type lists stands in some config that works."""
    hints = {f.name: f.type for f in dataclasses.fields(MoRConfig)}
    seen = {name: {getattr(tiny_config(kind), name) for kind in KINDS} for name in hints}
    assert seen["routing"] == set(get_args(hints["routing"]))
    assert seen["router_type"] == set(get_args(hints["router_type"]))
    assert seen["kv_strategy"] == set(get_args(hints["kv_strategy"]))
    assert seen["sharing"] == set(get_args(hints["sharing"]))


@pytest.mark.parametrize(
    ("name", "value"), [("gating", "additive"), ("z_loss_coeff", 0.1), ("router_temperature", 2.0)]
)
def test_routing_options_that_would_do_nothing_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.*routing='none'"):
        MoRConfig(routing="none", **{name: value})
