"""Parameters, FLOPs per token and KV bytes per token of any configuration, in closed form.

A multiply-add is two FLOPs. Counted are matrix products and attention, as torch's FLOP counter does
(norms, rotations and softmax are left out). A training step is three times its forward pass: the
backward pass has a product for the gradient of the inputs and one for that of the weights. (Kaplan
et al., arXiv 2001.08361, section 2.1, whose 6 N leaves out attention.)

`depth_fractions` is a tuple (R,): the share of all tokens that is at each depth, from the
configured capacities or from a measured histogram of recursion counts.

Letters in formulas: E hidden_size, I intermediate_size, H query heads, G key-value heads, D
head_dim, V vocab_size, L block layers, U prelude and coda layers, R recursions, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mor.errors import ConfigError
from mor.model.config import MoRConfig


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Forward FLOPs of one token by part of the model."""

    unshared: float
    """Of all prelude and coda layers."""
    depths: tuple[float, ...]
    """(R,) of the block at each depth for a token that is there, the depth's router included."""
    depth_fractions: tuple[float, ...]
    """(R,) share of tokens at each depth."""
    routing: float
    """Of routers that decide for tokens which then do not go on, averaged over all tokens."""
    head: float
    """2 V E."""

    @property
    def mean(self) -> float:
        """Of an average token: unshared + sum_r fraction_r * depths_r + routing + head."""
        block = sum(p * f for p, f in zip(self.depth_fractions, self.depths, strict=True))
        return self.unshared + block + self.routing + self.head

    def for_recursions(self, recursions: int) -> float:
        """Of a token that takes this many recursions (routers that stopped it aside)."""
        return self.unshared + sum(self.depths[:recursions]) + self.head


def depth_fractions_of(
    config: MoRConfig, histogram: Sequence[float] | None = None
) -> tuple[float, ...]:
    """(R,) share of tokens at each depth.

    Args:
        histogram: shares or numbers of tokens by recursion count: (R,) for counts 1..R, or
            (R + 1,) for counts 0..R. None takes `config.depth_capacities`.

    Raises:
        ConfigError: the histogram does not fit the model.
    """
    if histogram is None:
        return config.depth_capacities
    num, total = config.num_recursions, sum(histogram)
    if len(histogram) not in (num, num + 1) or total <= 0:
        raise ConfigError(
            f"a depth histogram of {len(histogram)} entries does not fit num_recursions={num}."
        )
    counts = list(histogram)[-num:]
    # A token is at depth r if it takes more than r recursions.
    return tuple(sum(counts[r:]) / total for r in range(num))


def num_layer_parameters(config: MoRConfig) -> int:
    """Parameters of one layer with its norms, without LoRA pairs: matrices + 2 E (+ 2 D)."""
    _, _, dim = config.num_heads_and_dim
    qk_norms = 2 * dim if config.qk_norm else 0
    return num_layer_matrix_parameters(config) + 2 * config.hidden_size + qk_norms


def num_layer_matrix_parameters(config: MoRConfig) -> int:
    """Parameters of one layer's seven matrices: E (2 G D + 2 H D + 3 I)."""
    return config.hidden_size * sum(_widths(config))


def _widths(config: MoRConfig) -> tuple[int, ...]:
    """(7,) for k, v, q, o, gate, up, down: the side of the matrix that is not E."""
    heads, kv_heads, dim = config.num_heads_and_dim
    return (*[kv_heads * dim] * 2, *[heads * dim] * 2, *[config.intermediate_size] * 3)


def num_lora_parameters(config: MoRConfig) -> int:
    """Parameters of the LoRA pairs of all layers and depths."""
    depths = range(config.num_recursions)
    return config.num_block_layers * sum(
        _num_depth_lora_parameters(config, depth) for depth in depths
    )


def _num_depth_lora_parameters(config: MoRConfig, depth: int) -> int:
    """Of one layer at one depth: sum over matrices (E, w) of rank * (E + w), rank <= min(E, w)."""
    width, rank = config.hidden_size, config.relaxation_rank
    first = 0 if config.kv_policy.writes(depth) else 2  # without k, v
    return sum(min(rank, width, w) * (width + w) for w in _widths(config)[first:])


def num_router_parameters(config: MoRConfig) -> int:
    """Parameters of all routers: R with one output (twice with `aux_router`), or one with R."""
    if config.routing == "expert_choice":
        one, copies = _router_matrices(config, 1), config.num_recursions
        return one * copies * (2 if config.selection_training == "aux_router" else 1)
    return _router_matrices(config, config.num_recursions) if config.routing != "none" else 0


def _router_matrices(config: MoRConfig, outputs: int) -> int:
    """Parameters of one router: E * outputs, or 2 E (E + outputs) with `mlp`."""
    width = config.hidden_size
    return {
        "linear": width * outputs,
        "mlp": 2 * width * (width + outputs),
        "random": 0,
    }[config.router_type]


def num_parameters_non_embedding(config: MoRConfig) -> int:
    """Parameters without embedding and head: what the paper (arXiv 2507.10524) reports."""
    layers = config.num_unique_layers * num_layer_parameters(config) + num_lora_parameters(config)
    return layers + config.hidden_size + num_router_parameters(config)


def num_parameters(config: MoRConfig) -> int:
    """All parameters; a head that is tied to the embedding counts once."""
    matrices = 1 if config.tie_word_embeddings else 2
    return num_parameters_non_embedding(config) + matrices * config.vocab_size * config.hidden_size


def sequence_flops(
    config: MoRConfig,
    length: int,
    *,
    depth_fractions: Sequence[float] | None = None,
    causal: bool = True,
) -> Flops:
    """Forward FLOPs per token of whole sequences, averaged over positions: training and prefill.

    Args:
        length: T, tokens per sequence.
        depth_fractions: (R,) share of tokens at each depth; None: `depth_fractions_of(config)`.
        causal: count only keys that a query sees; False counts the full square, as torch's FLOP
            counter does.
    """
    there = tuple(depth_fractions if depth_fractions is not None else depth_fractions_of(config))

    def keys(tokens: float) -> float:
        """Keys that an average query sees among so many tokens: the mean of 1, .. tokens."""
        return (tokens + 1) / 2 if causal else tokens

    seen = [keys(config.kv_policy.visible_fraction(p) * length) for p in there]
    return _flops(config, there, seen, keys(length))


def decode_flops(
    config: MoRConfig, context: int, *, depth_fractions: Sequence[float] | None = None
) -> Flops:
    """Forward FLOPs of one new token that sees `context` tokens, itself included."""
    there = tuple(depth_fractions if depth_fractions is not None else depth_fractions_of(config))
    seen = [config.kv_policy.visible_fraction(p) * context for p in there]
    return _flops(config, there, seen, context)


def _flops(
    config: MoRConfig,
    depth_fractions: tuple[float, ...],
    seen: Sequence[float],
    unshared_seen: float,
) -> Flops:
    """FLOPs of one token whose queries see so many keys, (R,) at each depth, and outside."""
    heads, kv_heads, dim = config.num_heads_and_dim
    matrices = 2 * num_layer_matrix_parameters(config)  # a multiply-add per weight
    kv_matrices = 2 * config.hidden_size * dim * 2 * kv_heads  # k_proj and v_proj: 4 E G D
    per_key = 2 * 2 * heads * dim  # 2 H D for q k, 2 H D for the sum of values
    unshared_layers = config.num_prelude_layers + config.num_coda_layers
    depths: list[float] = []
    routing = 0.0
    routers = 2 if config.selection_training == "aux_router" else 1
    for r, keys in enumerate(seen):
        layer = matrices - (0 if config.kv_policy.writes(r) else kv_matrices) + per_key * keys
        layer += 2 * _num_depth_lora_parameters(config, r)
        router = 0
        if config.routing == "expert_choice":
            router = 2 * routers * _router_matrices(config, 1)
            # It also decides for the tokens of the depth before that do not come here.
            routing += router * ((depth_fractions[r - 1] if r else 1.0) - depth_fractions[r])
        elif config.routing == "token_choice" and r == 0:  # decides once, for all depths
            router = 2 * _router_matrices(config, config.num_recursions)
        depths.append(config.num_block_layers * layer + router)
    return Flops(
        unshared=unshared_layers * (matrices + per_key * unshared_seen),
        depths=tuple(depths),
        depth_fractions=depth_fractions,
        routing=routing,
        head=2.0 * config.vocab_size * config.hidden_size,
    )


def training_flops(
    config: MoRConfig, length: int, depth_fractions: Sequence[float] | None = None
) -> float:
    """FLOPs per token of a training step, forward and backward: three times the forward pass."""
    return 3 * sequence_flops(config, length, depth_fractions=depth_fractions).mean


def kv_bytes_per_token(
    config: MoRConfig, *, depth_fractions: Sequence[float] | None = None, bytes_per_value: int = 2
) -> float:
    """Bytes of KV cache per token: (U + L * depths that it leaves entries at) * 2 G D * bytes."""
    _, kv_heads, dim = config.num_heads_and_dim
    there = depth_fractions if depth_fractions is not None else depth_fractions_of(config)
    policy = config.kv_policy
    depths = sum(policy.visible_fraction(p) for r, p in enumerate(there) if policy.writes(r))
    unshared_layers = config.num_prelude_layers + config.num_coda_layers
    layers = unshared_layers + config.num_block_layers * depths
    return layers * 2 * kv_heads * dim * bytes_per_value


def activation_values_per_token(
    config: MoRConfig, depth_fractions: Sequence[float] | None = None
) -> float:
    """Numbers that a training step keeps per token for its backward pass, head and loss aside.

    A layer keeps the inputs and outputs of its two norms (4 E), the rotated queries and keys, the
    values and attention's output (2 H D + 2 G D), and the SwiGLU's gate and up (2 I): what
    `ops.memory_efficient` saves. With `qk_norm` queries and keys also before their norms
    ((H + G) D).
    """
    heads, kv_heads, dim = config.num_heads_and_dim
    layer = 4 * config.hidden_size + 2 * (heads + kv_heads) * dim + 2 * config.intermediate_size
    if config.qk_norm:
        layer += (heads + kv_heads) * dim
    there = depth_fractions if depth_fractions is not None else depth_fractions_of(config)
    unshared_layers = config.num_prelude_layers + config.num_coda_layers
    return (unshared_layers + config.num_block_layers * sum(there)) * layer
