"""What a model costs: parameters, FLOPs per token, KV bytes per token, for any configuration.

A multiply-add is two FLOPs. Counted are matrix products and attention, as torch's FLOP counter does
(norms, rotations and softmax are left out). A training step is three
times its forward pass: one for the activations' and one for the weights' gradients.

`presence` is a tuple (R,): the share of all tokens that is there at each depth. It comes from the
configured capacities or from a measured depth histogram.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mor.errors import ConfigError
from mor.model.config import MoRConfig


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Forward FLOPs of one token, averaged over a sequence or at one position."""

    unshared: float
    """Prelude and coda layers."""
    depths: tuple[float, ...]
    """(R,) the block at each depth, for a token that is there, its router included."""
    depth_fractions: tuple[float, ...]
    """(R,) share of tokens at each depth."""
    routing: float
    """Routers that decide for tokens which then do not go on, averaged over all tokens."""
    head: float

    @property
    def mean(self) -> float:
        """Of an average token."""
        block = sum(p * f for p, f in zip(self.depth_fractions, self.depths, strict=True))
        return self.unshared + block + self.routing + self.head

    def for_recursions(self, recursions: int) -> float:
        """Of a token that takes this many recursions."""
        return self.unshared + sum(self.depths[:recursions]) + self.head


def depth_fractions_of(
    config: MoRConfig, histogram: Sequence[float] | None = None
) -> tuple[float, ...]:
    """(R,) share of tokens at each depth.

    Args:
        histogram: (R,) or (R + 1,) share or number of tokens by recursion count, from 1 or from 0
            recursions on; None takes what the configuration means to have.

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
    return tuple(sum(counts[r:]) / total for r in range(num))


def num_layer_parameters(config: MoRConfig) -> int:
    """Parameters of one layer, norms included, without the deltas of its depths."""
    return num_layer_matrix_parameters(config) + 2 * config.hidden_size


def num_layer_matrix_parameters(config: MoRConfig) -> int:
    """Parameters of one layer's seven matrices."""
    return config.hidden_size * sum(_widths(config))


def _widths(config: MoRConfig) -> tuple[int, ...]:
    """The side of each of a layer's matrices that is not the model's width; k and v come first."""
    heads, kv_heads, dim = config.num_heads_and_dim
    return (*[kv_heads * dim] * 2, *[heads * dim] * 2, *[config.intermediate_size] * 3)


def num_lora_parameters(config: MoRConfig) -> int:
    """Parameters of the low-rank deltas of all depths."""
    depths = range(config.num_recursions)
    return config.num_block_layers * sum(
        _num_depth_lora_parameters(config, depth) for depth in depths
    )


def _num_depth_lora_parameters(config: MoRConfig, depth: int) -> int:
    """Of one layer at one depth; where depths share keys and values, only depth 0 computes them."""
    width, rank = config.hidden_size, config.relaxation_rank
    first = 0 if config.kv_policy.writes(depth) else 2  # without k and v
    return sum(min(rank, width, w) * (width + w) for w in _widths(config)[first:])


def num_router_parameters(config: MoRConfig) -> int:
    """Parameters of all routers, auxiliary ones included."""
    if config.routing == "expert_choice":
        one, copies = _router_matrices(config, 1), config.num_recursions
        return one * copies * (2 if config.selection_training == "aux_router" else 1)
    return _router_matrices(config, config.num_recursions) if config.routing != "none" else 0


def _router_matrices(config: MoRConfig, outputs: int) -> int:
    width = config.hidden_size
    return {
        "linear": width * outputs,
        "mlp": 2 * width * (width + outputs),
        "random": 0,
    }[config.router_type]


def num_parameters_non_embedding(config: MoRConfig) -> int:
    """Everything but the embedding and the head; the paper's parameter count."""
    layers = config.num_unique_layers * num_layer_parameters(config) + num_lora_parameters(config)
    return layers + config.hidden_size + num_router_parameters(config)


def num_parameters(config: MoRConfig) -> int:
    """All parameters; a tied head counts once."""
    matrices = 1 if config.tie_word_embeddings else 2
    return num_parameters_non_embedding(config) + matrices * config.vocab_size * config.hidden_size


def sequence_flops(
    config: MoRConfig,
    length: int,
    *,
    depth_fractions: Sequence[float] | None = None,
    causal: bool = True,
) -> Flops:
    """Forward FLOPs per token of whole sequences: training and prefill.

    Args:
        length: T, tokens per sequence.
        presence: (R,) share of tokens at each depth; None: `depth_fractions_of(config)`.
        causal: count only keys that a query sees; False counts the full square, as torch's FLOP
            counter does.
    """
    there = tuple(depth_fractions if depth_fractions is not None else depth_fractions_of(config))

    def keys(tokens: float) -> float:
        return (tokens + 1) / 2 if causal else tokens

    seen = [keys(config.kv_policy.visible_fraction(p) * length) for p in there]
    return _flops(config, there, seen, keys(length))


def decode_flops(
    config: MoRConfig, context: int, *, depth_fractions: Sequence[float] | None = None
) -> Flops:
    """Forward FLOPs of one new token after `context` tokens, itself included."""
    there = tuple(depth_fractions if depth_fractions is not None else depth_fractions_of(config))
    seen = [config.kv_policy.visible_fraction(p) * context for p in there]
    return _flops(config, there, seen, context)


def _flops(
    config: MoRConfig,
    depth_fractions: tuple[float, ...],
    seen: Sequence[float],
    unshared_seen: float,
) -> Flops:
    heads, kv_heads, dim = config.num_heads_and_dim
    matrices = 2 * num_layer_matrix_parameters(config)
    kv_matrices = 2 * config.hidden_size * dim * 2 * kv_heads  # k_proj and v_proj
    per_key = 2 * 2 * heads * dim  # scores and mixing
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
            routing += router * ((depth_fractions[r - 1] if r else 1.0) - depth_fractions[r])
        elif config.routing == "token_choice" and r == 0:
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
    """FLOPs of one training token in sequences of `length`: forward and backward."""
    return 3 * sequence_flops(config, length, depth_fractions=depth_fractions).mean


def kv_bytes_per_token(
    config: MoRConfig, *, depth_fractions: Sequence[float] | None = None, bytes_per_value: int = 2
) -> float:
    """Bytes of keys and values that an average token leaves in the cache, all layers."""
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
    """Values that a training step keeps per token for its backward pass, head and loss aside.

    A layer keeps the inputs of its two norms and what they give (4 E), the rotated queries and
    keys, values and attention's output (2 H D + 2 G D), and the SwiGLU's gate and up.
    """
    heads, kv_heads, dim = config.num_heads_and_dim
    layer = 4 * config.hidden_size + 2 * (heads + kv_heads) * dim + 2 * config.intermediate_size
    there = depth_fractions if depth_fractions is not None else depth_fractions_of(config)
    unshared_layers = config.num_prelude_layers + config.num_coda_layers
    return (unshared_layers + config.num_block_layers * sum(there)) * layer
