"""`MoRConfig`: one frozen description of a model, from vanilla to Mixture-of-Recursions.

Field names are Hugging Face's Llama names where the meaning is the same. Everything is checked when
the config is built, so that no later code has to ask whether a combination can work.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mor.errors import ConfigError
from mor.model.kv_policy import KV_POLICIES, KVPolicy
from mor.model.presets import preset_fields
from mor.validation import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    check_fields,
    check_keys,
)

Sharing = Literal["cycle", "sequence"]
Routing = Literal["none", "expert_choice", "token_choice"]
KVStrategy = Literal["recursion_wise", "shared"]
RouterType = Literal["linear", "mlp", "random"]
RouterActivation = Literal["sigmoid", "tanh", "softmax", "none"]
SelectionTraining = Literal["aux_loss", "aux_router", "none"]
Balancing = Literal["loss", "loss_free", "none"]
Gating = Literal["weighted", "additive"]

LLAMA_FIELDS: tuple[str, ...] = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_theta",
    "rms_norm_eps",
    "qk_norm",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""What a Llama config says under the same names: everything but layers and routing."""


@dataclass(frozen=True, kw_only=True)
class MoRConfig:
    """Everything that defines a model's function, and nothing about how it is trained or run.

    A plain ("vanilla") Transformer is `num_recursions=1, routing="none"`; a recursive Transformer
    has `num_recursions > 1, routing="none"`. Fields whose default is None are resolved from
    `routing` when the config is built and are never None afterwards, where they apply.

    Raises:
        ConfigError: a value or a combination cannot work; the message names field and cure.
    """

    __no_type_check__ = True  # values come from users' files: __post_init__ checks them

    vocab_size: PositiveInt = 49152
    """V, entries of the embedding and of the head."""
    hidden_size: PositiveInt = 576
    """E, width of the residual stream."""
    intermediate_size: PositiveInt = 1536
    """Width inside the SwiGLU."""
    num_attention_heads: PositiveInt = 9
    """H, query heads."""
    num_key_value_heads: PositiveInt | None = None
    """G, key-value heads; None means as many as query heads."""
    head_dim: PositiveInt | None = None
    """D; None means hidden_size / num_attention_heads."""
    max_position_embeddings: PositiveInt = 2048
    """Longest sequence, in tokens."""
    rope_theta: NonNegativeFloat = 10000.0
    """Base of the rotary embedding's wavelengths."""
    rms_norm_eps: NonNegativeFloat = 1e-5
    """Added to the mean square that RMSNorm divides by."""
    qk_norm: bool = False
    """Whether each query and key head is normalized before RoPE, as in Qwen3."""
    tie_word_embeddings: bool = True
    """Whether the head is the embedding."""
    initializer_range: NonNegativeFloat = 0.02
    """Standard deviation of the initial weights."""

    num_prelude_layers: NonNegativeInt = 1
    """Unshared layers before the block."""
    num_block_layers: PositiveInt = 10
    """L, layers of the shared block."""
    num_coda_layers: NonNegativeInt = 1
    """Unshared layers after the block."""
    num_recursions: PositiveInt = 3
    """R, the most passes of the block that a token can take."""
    twin_num_layers: PositiveInt | None = None
    """Layers of the vanilla twin that this model is compared with; None: the effective count."""

    sharing: Sharing = "cycle"
    """`cycle`: the block as a whole is repeated. `sequence`: each of its layers is, before the next
    one starts."""
    relaxation_rank: NonNegativeInt = 0
    """Rank of the LoRA pair that each depth adds to each matrix of the block; 0: there is none."""
    routing: Routing = "expert_choice"
    """Who decides how deep a token goes: each depth chooses its tokens (`expert_choice`), or each
    token its depth at the start (`token_choice`)."""
    kv_strategy: KVStrategy = "recursion_wise"
    """`recursion_wise`: each depth has keys and values of its own tokens. `shared`: all depths read
    those of depth 0."""
    capacities: tuple[float, ...] | None = None
    """c_r, fraction of the sequence that expert choice sends to depth r; None: (R - r) / R."""
    router_type: RouterType = "linear"
    """`random` ignores its input: the baseline that every learned router has to beat."""
    router_activation: RouterActivation | None = None
    """Of the gate. None: sigmoid for expert choice, softmax for token choice."""
    router_alpha: NonNegativeFloat | None = None
    """Scale of the gate. None: 0.1 for expert choice, 1.0 for token choice."""
    router_temperature: NonNegativeFloat = 1.0
    """Divides the router's logits; above 0."""
    selection_training: SelectionTraining | None = None
    """How expert choice learns to select without looking ahead. None: `aux_loss`."""
    aux_loss_coeff: NonNegativeFloat = 0.001
    """Weight of the auxiliary loss of `selection_training`."""
    balancing: Balancing | None = None
    """How token choice spreads its tokens over depths. None: `loss`."""
    balancing_coeff: NonNegativeFloat = 0.1
    """Weight of the balancing loss (`loss`)."""
    balancing_update_rate: NonNegativeFloat = 0.001
    """Step of the router's bias after each batch (`loss_free`)."""
    z_loss_coeff: NonNegativeFloat = 0.0
    """Weight of the router's z-loss."""
    gating: Gating = "weighted"
    """What the block adds to the residual stream is multiplied by the gate (`weighted`), or not."""
    thresholds: tuple[float, ...] | None = None
    """tau_r, router logit from which a token goes on to depth r. None: 0, sigmoid's 0.5."""

    bos_token_id: NonNegativeInt | None = None
    """Token before a text. None: the model has none."""
    eos_token_id: NonNegativeInt | None = None
    """Token after a text, which ends a request. None: the tokenizer's."""
    pad_token_id: NonNegativeInt | None = None
    """Token that other programs fill a batch's shorter sequences with. None: there is none."""

    def __post_init__(self) -> None:
        # The length of a table is num_recursions: `_check_depth_tables` looks at both together.
        check_fields(self, ConfigError, skip=("capacities", "thresholds"))
        for name, value in self._resolved().items():
            object.__setattr__(self, name, value)
        self._check_shapes()
        self._check_routing()
        self._check_depth_tables()

    # -- construction ---------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, num_recursions: int = 3, **overrides: Any) -> "MoRConfig":
        """The paper's shapes with middle-cycle sharing; `num_recursions=1` gives the vanilla model.

        Args:
            name: `135m`, `360m`, `730m`, `1.7b` (arXiv 2507.10524, appendix) or `demo`.
            num_recursions: R; the block gets ceil((layers - 2) / R) layers.
            **overrides: any other field.
        """
        return cls.from_dict({"preset": name, "num_recursions": num_recursions, **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[Any, Any]) -> "MoRConfig":
        """Build from plain data (YAML, config.json); a `preset` key fills what is not given.

        Raises:
            ConfigError: an unknown key (the message names the nearest known one) or a bad value.
        """
        values = dict(values)
        preset = values.pop("preset", None)
        check_keys(values, cls, "model field", ConfigError)
        if preset is not None:
            values = {**preset_fields(str(preset), values.get("num_recursions", 3)), **values}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` turns back into an equal config."""
        return asdict(self)

    def with_thresholds(self, thresholds: tuple[float, ...]) -> "MoRConfig":
        """The same model with other routing thresholds."""
        return replace(self, thresholds=thresholds)

    def vanilla_twin(self) -> "MoRConfig":
        """The plain Transformer of the same width that this model is compared with."""
        return MoRConfig(
            **{f: getattr(self, f) for f in LLAMA_FIELDS},
            num_prelude_layers=0,
            num_block_layers=self.twin_num_layers or self.num_hidden_layers,
            num_coda_layers=0,
            num_recursions=1,
            routing="none",
        )

    # -- derived --------------------------------------------------------------------------------

    @property
    def num_hidden_layers(self) -> int:
        """Effective layers of a token at full depth: prelude + R * block + coda."""
        passes = self.num_recursions * self.num_block_layers
        return self.num_prelude_layers + passes + self.num_coda_layers

    @property
    def num_unique_layers(self) -> int:
        """Layers that own parameters: prelude + block + coda."""
        return self.num_prelude_layers + self.num_block_layers + self.num_coda_layers

    @property
    def num_heads_and_dim(self) -> tuple[int, int, int]:
        """(H, G, D) with the defaults resolved."""
        assert self.num_key_value_heads is not None
        assert self.head_dim is not None
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    @property
    def kv_policy(self) -> KVPolicy:
        """Which depths write keys and values and which read them: what `kv_strategy` stands for."""
        return KV_POLICIES[self.kv_strategy]

    @property
    def depth_capacities(self) -> tuple[float, ...]:
        """(R,) fraction of tokens that the configuration means to have at each depth."""
        if self.capacities is not None:
            return self.capacities
        depths = range(self.num_recursions)
        if self.routing == "token_choice":  # balanced counts: a token in R stops at each depth
            return tuple((self.num_recursions - r) / self.num_recursions for r in depths)
        return tuple(1.0 for _ in depths)

    # -- checks ---------------------------------------------------------------------------------

    def _resolved(self) -> dict[str, Any]:
        """Values of the fields that were left to their defaults, and lists as tuples."""
        expert, token = self.routing == "expert_choice", self.routing == "token_choice"
        resolved: dict[str, Any] = {
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
        }
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} does not divide by "
                f"num_attention_heads={self.num_attention_heads}: change one, or give head_dim."
            )
        if expert or token:
            resolved |= {
                "router_activation": "sigmoid" if expert else "softmax",
                "router_alpha": 0.1 if expert else 1.0,
                "selection_training": "aux_loss" if expert else "none",
                "balancing": "none" if expert else "loss",
            }
            if self.router_type == "random":  # nothing to train
                resolved |= {"selection_training": "none", "balancing": "none"}
        else:
            resolved |= {"selection_training": "none", "balancing": "none"}
        if expert:
            depths = range(self.num_recursions)
            resolved["capacities"] = tuple(
                (self.num_recursions - r) / self.num_recursions for r in depths
            )
            resolved["thresholds"] = tuple(0.0 for _ in depths)
        left = {name: value for name, value in resolved.items() if getattr(self, name) is None}
        tables = {name: getattr(self, name) for name in ("capacities", "thresholds")}
        return left | {name: tuple(t) for name, t in tables.items() if isinstance(t, list)}

    def _check_shapes(self) -> None:
        heads, kv_heads, head_dim = self.num_heads_and_dim
        if heads % kv_heads:
            raise ConfigError(
                f"num_attention_heads={heads} does not divide by num_key_value_heads={kv_heads}: "
                "each key-value head serves the same number of query heads."
            )
        if head_dim % 2:
            raise ConfigError(f"head_dim={head_dim} must be even: RoPE rotates pairs.")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.vocab_size:
                raise ConfigError(f"{name}={token} must be below vocab_size={self.vocab_size}.")
        if self.router_temperature == 0:
            raise ConfigError("router_temperature=0 divides by zero: 1.0 is the paper's.")
        if self.num_recursions == 1 and self.routing != "none":
            raise ConfigError(
                f"routing={self.routing!r} needs num_recursions >= 2: with num_recursions=1 there "
                "is nothing to route; set routing='none' for a vanilla model."
            )
        if self.relaxation_rank > (self.hidden_size if self.num_recursions > 1 else 0):
            raise ConfigError(
                f"relaxation_rank={self.relaxation_rank} must be at most hidden_size="
                f"{self.hidden_size}, which is full rank, and needs num_recursions >= 2: only a "
                "layer that runs at several depths can be relaxed."
            )
        if self.num_recursions == 1 and self.kv_strategy == "shared":
            raise ConfigError("kv_strategy='shared' needs num_recursions >= 2: nothing to share.")
        if self.sharing == "sequence" and self.routing != "none":
            raise ConfigError(
                f"routing={self.routing!r} needs sharing='cycle': with 'sequence' a layer finishes "
                "all its passes before the next one starts, so no token can leave after a pass."
            )

    def _check_routing(self) -> None:
        def only(name: str, value: object, allowed: tuple[object, ...]) -> None:
            if value not in allowed:
                options = " or ".join(repr(a) for a in allowed)
                raise ConfigError(
                    f"{name}={value!r} does not go with routing={self.routing!r} and "
                    f"router_type={self.router_type!r}: use {options}."
                )

        random = self.router_type == "random"
        if self.routing == "expert_choice":
            only("router_activation", self.router_activation, ("sigmoid", "tanh", "none"))
            only("balancing", self.balancing, ("none",))
            if random:
                only("selection_training", self.selection_training, ("none",))
        elif self.routing == "token_choice":
            only("router_activation", self.router_activation, ("softmax", "sigmoid"))
            only("selection_training", self.selection_training, ("none",))
            if random:
                only("balancing", self.balancing, ("none",))
        else:
            only("router_activation", self.router_activation, (None,))
            only("router_alpha", self.router_alpha, (None,))
            only("selection_training", self.selection_training, ("none",))
            only("balancing", self.balancing, ("none",))
            only("gating", self.gating, ("weighted",))  # the defaults: nothing is routed
            only("z_loss_coeff", self.z_loss_coeff, (0,))
            only("router_temperature", self.router_temperature, (1,))
        if self.routing != "expert_choice":
            only("capacities", self.capacities, (None,))
            only("thresholds", self.thresholds, (None,))

    def _check_depth_tables(self) -> None:
        for name in ("capacities", "thresholds"):
            table = getattr(self, name)
            if table is None:
                continue
            numbers = isinstance(table, tuple) and all(
                isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
                for x in table
            )
            if not numbers or len(table) != self.num_recursions:
                raise ConfigError(
                    f"{name}={table!r} must hold num_recursions={self.num_recursions} numbers."
                )
        if self.capacities is None:
            return
        falling = all(a >= b for a, b in zip(self.capacities, self.capacities[1:], strict=False))
        if not falling or not all(0 < c <= 1 for c in self.capacities):
            raise ConfigError(
                f"capacities={self.capacities} must lie in (0, 1] and never grow with depth: only "
                "tokens that were at depth r - 1 can go on to depth r."
            )
        if self.kv_strategy == "shared" and self.capacities[0] != 1:
            raise ConfigError(
                f"kv_strategy='shared' needs capacities[0]=1, not {self.capacities[0]}: depth 0 "
                "computes the keys and values of every token for all depths."
            )
