"""Tiny models and the random configurations that property tests draw from."""

from typing import Any

import torch
from hypothesis import strategies as st

from mor.model.config import MoRConfig
from mor.model.transformer import MoRModel

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 96,
    "initializer_range": 0.15,
    "num_block_layers": 2,
}

# One of every kind; the property tests below draw the rest.
KINDS: dict[str, dict[str, Any]] = {
    "vanilla": {"num_recursions": 1, "routing": "none"},
    "recursive": {"num_recursions": 3, "routing": "none"},
    "recursive_shared": {"num_recursions": 3, "routing": "none", "kv_strategy": "shared"},
    "sequence": {"num_recursions": 2, "routing": "none", "sharing": "sequence"},
    "expert": {"num_recursions": 3},
    "expert_shared": {"num_recursions": 3, "kv_strategy": "shared"},
    "expert_relaxed": {"num_recursions": 3, "relaxation_rank": 5},
    "expert_qk_norm": {"num_recursions": 3, "qk_norm": True},
    "expert_aux_router": {"num_recursions": 2, "selection_training": "aux_router"},
    "expert_bare": {
        "num_recursions": 4,
        "num_prelude_layers": 0,
        "num_coda_layers": 0,
        "capacities": (0.8, 0.7, 0.3, 0.2),
        "router_type": "mlp",
        "router_activation": "tanh",
        "gating": "additive",
        "z_loss_coeff": 0.01,
    },
    "expert_random": {"num_recursions": 3, "router_type": "random"},
    "token": {"num_recursions": 3, "routing": "token_choice"},
    "token_shared": {"num_recursions": 3, "routing": "token_choice", "kv_strategy": "shared"},
    "token_loss_free": {
        "num_recursions": 4,
        "routing": "token_choice",
        "balancing": "loss_free",
        "router_activation": "sigmoid",
        "z_loss_coeff": 0.01,
    },
}


def tiny_config(kind: str = "expert", **overrides: Any) -> MoRConfig:
    """A config of one of KINDS, with fields replaced."""
    return MoRConfig(**{**SHAPE, **KINDS[kind], **overrides})


def tiny_model(kind: str = "expert", seed: int = 0, **overrides: Any) -> MoRModel:
    """A float64 model in evaluation mode whose routers really split the tokens."""
    return build(tiny_config(kind, **overrides), seed)


def build(config: MoRConfig, seed: int = 0) -> MoRModel:
    """A float64 model in evaluation mode, norms and biases moved off their initial values."""
    torch.manual_seed(seed)
    model = MoRModel(config).double().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.uniform_(0.5, 1.5)
            if "delta_" in name:
                value.normal_(std=0.15)
            if "router" in name and "proj" in name:
                value.mul_(4)  # not more: a saturated gate would make ties
        for name, value in model.named_buffers():
            if name.endswith("bias"):
                value.uniform_(-0.05, 0.05)
    return model


def _capacities(draw: st.DrawFn, num_recursions: int, first_full: bool) -> tuple[float, ...]:
    values = sorted(
        (draw(st.floats(0.1, 1.0)) for _ in range(num_recursions)),
        reverse=True,
    )
    return (1.0, *values[1:]) if first_full else tuple(values)


@st.composite
def configs(draw: st.DrawFn) -> MoRConfig:
    """Any configuration that can work, at a tiny size."""
    routing = draw(st.sampled_from(["none", "expert_choice", "token_choice"]))
    recursions = draw(st.integers(1 if routing == "none" else 2, 4))
    shared = recursions > 1 and draw(st.booleans())
    fields: dict[str, Any] = {
        **SHAPE,
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "num_prelude_layers": draw(st.integers(0, 2)),
        "num_block_layers": draw(st.integers(1, 2)),
        "num_coda_layers": draw(st.integers(0, 2)),
        "num_recursions": recursions,
        "routing": routing,
        "sharing": draw(st.sampled_from(["cycle", "sequence"])) if routing == "none" else "cycle",
        "kv_strategy": "shared" if shared else "recursion_wise",
        "tie_word_embeddings": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "relaxation_rank": draw(st.sampled_from([0, 0, 3, 20])) if recursions > 1 else 0,
    }
    if routing == "none":
        return MoRConfig(**fields)
    fields |= {
        "router_type": draw(st.sampled_from(["linear", "mlp", "random"])),
        "router_alpha": draw(st.sampled_from([0.1, 1.0])),
        "router_temperature": draw(st.sampled_from([0.5, 1.0, 2.0])),
        "gating": draw(st.sampled_from(["weighted", "additive"])),
        "z_loss_coeff": draw(st.sampled_from([0.0, 0.01])),
    }
    random = fields["router_type"] == "random"
    if routing == "expert_choice":
        training = st.sampled_from(["aux_loss", "aux_router", "none"])
        fields |= {
            "capacities": _capacities(draw, recursions, shared or draw(st.booleans())),
            "router_activation": draw(st.sampled_from(["sigmoid", "tanh", "none"])),
            "selection_training": "none" if random else draw(training),
            "thresholds": tuple(draw(st.floats(-0.5, 0.3)) for _ in range(recursions)),
        }
    else:
        balancing = st.sampled_from(["loss", "loss_free", "none"])
        fields |= {
            "router_activation": draw(st.sampled_from(["softmax", "sigmoid"])),
            "balancing": "none" if random else draw(balancing),
        }
    return MoRConfig(**fields)
