"""The Mixture-of-Recursions language model, as stages that training and inference both call.

    embed -> prelude -> block, up to R times for the tokens that go on -> coda -> logits

Hidden states are (N, E): only the tokens that are present are computed (`ragged_batch`).
Shape letters: B batch, T time, N present tokens, R recursions, E width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mor.errors import ConfigError, RequestError
from mor.model.attention import (
    AttentionBackend,
    ForwardContext,
    FullSequenceAttention,
    RotaryEmbedding,
)
from mor.model.config import MoRConfig
from mor.model.depth_lora import DepthLoRALinear
from mor.model.layers import Layer
from mor.model.norm import RMSNorm
from mor.model.ragged_batch import RaggedBatch
from mor.model.router import (
    ExpertChoiceRouter,
    RecursionLimits,
    RoutingOutput,
    Selection,
    TokenChoiceRouter,
    num_selected,
)
from mor.model.sharing import UNSHARED, LayerKey, block_schedule
from mor.ops.cross_entropy import IGNORE, linear_cross_entropy
from mor.ops.document_attention import number_documents

ActivationCheckpointing = Literal["none", "recursion", "full"]


@dataclass(frozen=True, kw_only=True)
class MoROutput:
    """What one forward pass returns."""

    logits: Float[Tensor, "b t v"] | None
    """None with `return_logits=False`."""
    loss: Float[Tensor, ""] | None
    """Language-model loss in nats: the sum over predicted tokens divided by the labels that count.

    With `labels`, position 0 counts but is not predicted, as in the reference implementation.
    """
    total_loss: Float[Tensor, ""] | None
    """`loss` plus each auxiliary loss times its coefficient: what training minimizes."""
    aux_losses: dict[str, Tensor]
    """Unscaled: `sampling_loss`, `balancing_loss`, `router_z_loss`, as far as they apply."""
    recursion_counts: Int[Tensor, "b t"]
    """Passes of the block that each token took (0 if depth 0 has capacity below 1 and left it)."""
    selected: list[Tensor]
    """Expert choice by `topk`: for each depth the (B, k_r) selected positions; otherwise empty."""
    router_accuracy: list[Tensor]
    """Expert choice by `topk`: for each depth that left tokens out, the share of candidates on
    which `threshold` agrees."""


class MoRModel(nn.Module):
    """Vanilla, recursive and Mixture-of-Recursions Transformers (arXiv 2507.10524).

    With P prelude, f block and C coda layers, and count(t) the recursions that routing gives to
    token t:

        vanilla, recursive  logits = head(norm(C(f^R(P(embed(ids))))))
        expert choice       h <- h + g_r f(h) at each depth r < count(t)   instead of f^R
        token choice        h <- h + p f^count(t)(h)                       instead of f^R

    transformers calls such a class `LlamaForCausalLM`; prelude, block and coda are also called
    first layers, shared (tied, looped) layers and last layers.

    Args:
        config: what to build. Parameters are drawn from N(0, initializer_range).
    """

    activation_checkpointing: ActivationCheckpointing = "none"
    """What a training step computes again in its backward pass instead of keeping it from the
    forward pass: each pass of the block (`recursion`) or every layer (`full`)."""

    def __init__(self, config: MoRConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.prelude = nn.ModuleList(Layer(config) for _ in range(config.num_prelude_layers))
        rank = config.relaxation_rank
        self.block = nn.ModuleList(Layer(config, rank) for _ in range(config.num_block_layers))
        self.coda = nn.ModuleList(Layer(config) for _ in range(config.num_coda_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._initialize)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        # Routers and LoRA pairs are drawn last: models that differ only in them start from equal
        # weights.
        self.router: ExpertChoiceRouter | TokenChoiceRouter | None = None
        if config.routing == "expert_choice":
            self.router = ExpertChoiceRouter(config).apply(self._initialize)
        elif config.routing == "token_choice":
            self.router = TokenChoiceRouter(config).apply(self._initialize)
        for module in self.block.modules():
            if isinstance(module, DepthLoRALinear):
                module.reset_loras(config.initializer_range)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def set_thresholds(self, thresholds: tuple[float, ...]) -> None:
        """Replace the routing thresholds, e.g. by calibrated ones; they are saved with the model.

        Raises:
            ConfigError: the model has no thresholds, or not this many.
        """
        if not isinstance(self.router, ExpertChoiceRouter):
            raise ConfigError(
                f"thresholds need routing='expert_choice'; this model has "
                f"routing={self.config.routing!r}."
            )
        self.config = self.router.config = self.config.with_thresholds(thresholds)

    # -- stages ---------------------------------------------------------------------------------

    def context(self, ragged: RaggedBatch, kv: AttentionBackend) -> ForwardContext:
        """The context of the tokens in `ragged`, with their RoPE angles."""
        _, _, head_dim = self.config.num_heads_and_dim
        dtype = self.embed_tokens.weight.dtype
        rope = RotaryEmbedding.at(ragged.positions, head_dim, self.config.rope_theta, dtype)
        return ForwardContext(ragged=ragged, rope=rope, kv=kv)

    def run_prelude(self, x: Float[Tensor, "n e"], context: ForwardContext) -> Float[Tensor, "n e"]:
        """(N, E) states after the unshared first layers."""
        for i, layer in enumerate(self.prelude):
            x = self._run_layer(layer, x, LayerKey(UNSHARED, i), context)
        return x

    def run_block(
        self, x: Float[Tensor, "n e"], depth: int, context: ForwardContext
    ) -> Float[Tensor, "n e"]:
        """f(h): (N, E) states after one pass of the shared block, its own residuals included."""
        if self._checkpoints("recursion"):
            return _checkpointed(self._run_block_layers, x, depth, context)
        return self._run_block_layers(x, depth, context)

    def _run_block_layers(self, x: Tensor, depth: int, context: ForwardContext) -> Tensor:
        for i, layer in enumerate(self.block):
            x = self._run_layer(layer, x, LayerKey(depth, i), context)
        return x

    def _run_layer(
        self, layer: nn.Module, x: Tensor, layer_key: LayerKey, context: ForwardContext
    ) -> Tensor:
        """One layer; a compiled one is checkpointed from outside, as one piece."""
        if self._checkpoints("full"):
            return _checkpointed(layer, x, layer_key, context)
        return layer(x, layer_key, context)

    def _checkpoints(self, piece: ActivationCheckpointing) -> bool:
        # Without a backward pass nothing is kept; and in evaluation mode a layer may write into a
        # key-value cache, which a second forward pass must not do again.
        active = self.training and torch.is_grad_enabled()
        return active and self.activation_checkpointing == piece

    def run_coda(self, x: Float[Tensor, "n e"], context: ForwardContext) -> Float[Tensor, "n e"]:
        """(N, E) states after the unshared last layers."""
        for i, layer in enumerate(self.coda):
            x = self._run_layer(layer, x, LayerKey(UNSHARED, len(self.prelude) + i), context)
        return x

    def compute_logits(self, x: Float[Tensor, "*n e"]) -> Float[Tensor, "*n v"]:
        """Logits: head(norm(x))."""
        return self.lm_head(self.norm(x))

    def run_recursions(
        self,
        x: Float[Tensor, "n e"],
        context: ForwardContext,
        selection: Selection,
        capacities: Sequence[float] | None = None,
        limits: RecursionLimits | None = None,
    ) -> tuple[Float[Tensor, "n e"], Int[Tensor, " n"], RoutingOutput]:
        """All recursions: (N, E) states after the block, (N,) recursion counts, what routers did.

        Args:
            x: (N, E) states before the block, of all tokens.
            capacities: (R,) fractions of each sequence's tokens for the `topk` rule; None takes
                the config's.
            limits: bounds on each token's passes; not with `topk`, nor with `sharing='sequence'`,
                where tokens cannot stop early.
        """
        record = RoutingOutput()
        if isinstance(self.router, ExpertChoiceRouter):
            out, counts = self._run_expert_choice(x, context, selection, capacities, record, limits)
        elif isinstance(self.router, TokenChoiceRouter):
            out, counts = self._run_token_choice(x, context, record, limits)
        else:
            out, counts = self._run_unrouted(x, context, limits)
        return out, counts, record

    def _run_unrouted(
        self, x: Tensor, context: ForwardContext, limits: RecursionLimits | None
    ) -> tuple[Tensor, Tensor]:
        """h <- f(h), R times or up to the limit."""
        config = self.config
        if limits is not None:
            assert config.sharing == "cycle", "a layer finishes all its passes before the next one"
            return self._repeat(x, limits.max_recursions, context), limits.max_recursions
        counts = torch.full_like(context.ragged.token_indices, config.num_recursions)
        if config.sharing == "cycle":
            for depth in range(config.num_recursions):
                x = self.run_block(x, depth, context)
            return x, counts
        for layer_key in block_schedule(
            config.sharing, config.num_block_layers, config.num_recursions
        ):
            x = self._run_layer(self.block[layer_key.layer], x, layer_key, context)
        return x, counts

    def _run_expert_choice(
        self,
        x: Tensor,
        context: ForwardContext,
        selection: Selection,
        capacities: Sequence[float] | None,
        record: RoutingOutput,
        limits: RecursionLimits | None,
    ) -> tuple[Tensor, Tensor]:
        """h <- h + g_r f(h) for the tokens that depth r selects from those of depth r - 1."""
        assert isinstance(self.router, ExpertChoiceRouter)
        fractions = self.config.depth_capacities if capacities is None else capacities
        sequences = context.ragged  # capacities are fractions of these, at every depth
        counts = torch.zeros_like(sequences.token_indices)  # (N,)
        h = candidates = x  # all tokens' states; those of the tokens at the depth before
        for depth in range(self.config.num_recursions):
            topk = num_selected(fractions[depth], sequences) if selection == "topk" else None
            selected = self.router.choose(depth, candidates, context.ragged, topk, record, limits)
            # From here on candidates and context are those of the selected tokens only.
            if selected.indices is not None:
                candidates = candidates.index_select(0, selected.indices)
                context = context.select(selected.ragged, selected.indices)
            if selected.ragged.num_tokens == 0:  # under `threshold` nobody may go on
                break
            update = self.run_block(candidates, depth, context)
            if self.config.gating == "weighted":
                update = selected.gate.to(update.dtype) * update
            candidates = candidates + update
            h = self._write_back(h, candidates, selected.ragged)
            counts[selected.ragged.token_indices] += 1
        return h, counts

    def _run_token_choice(
        self,
        x0: Tensor,
        context: ForwardContext,
        record: RoutingOutput,
        limits: RecursionLimits | None,
    ) -> tuple[Tensor, Tensor]:
        """x0 + p f^count(x0), the count of each token chosen before the block."""
        assert isinstance(self.router, TokenChoiceRouter)
        counts, weight = self.router.choose(x0, context.ragged, record, limits)
        h = self._repeat(x0, counts, context)
        if self.config.gating == "weighted":
            h = weight.to(h.dtype) * h
        return x0 + h, counts

    def _repeat(self, x: Tensor, counts: Tensor, context: ForwardContext) -> Tensor:
        """f^count(x): each token passes the block as often as its count says, at least once."""
        h = present = x  # all tokens' states; those of the tokens at this depth
        for depth in range(self.config.num_recursions):
            if depth > 0:  # at depth 0 all are present
                goes_on = counts[context.ragged.token_indices] > depth
                ragged, rows = context.ragged.select(goes_on)
                if ragged.num_tokens == 0:
                    break
                present = present.index_select(0, rows)
                context = context.select(ragged, rows)
            present = self.run_block(present, depth, context)
            h = self._write_back(h, present, context.ragged)
        return h

    @staticmethod
    def _write_back(h: Tensor, present: Tensor, ragged: RaggedBatch) -> Tensor:
        """All tokens' states, with new ones for the tokens in `ragged`."""
        if ragged.num_tokens == h.shape[0]:
            return present
        # Not in place: the backward pass needs the states before.
        return h.index_copy(0, ragged.token_indices, present)

    # -- forward pass ----------------------------------------------------------------------------

    def hidden_states(
        self,
        input_ids: Int[Tensor, "b t"],
        selection: Selection,
        capacities: Sequence[float] | None = None,
        document_end: int | None = None,
    ) -> tuple[Float[Tensor, "n e"], Int[Tensor, " n"], RoutingOutput]:
        """(B * T, E) states before the final norm, recursion counts, and what the routers did.

        Arguments as those of `forward`.

        Raises:
            RequestError: the sequence is longer than `max_position_embeddings`, or empty.
        """
        batch, time = input_ids.shape
        if not 0 < time <= self.config.max_position_embeddings:
            raise RequestError(
                f"a sequence of {time} tokens does not fit this model: it takes 1 to "
                f"max_position_embeddings={self.config.max_position_embeddings}."
            )
        ragged = RaggedBatch.full(batch, time, input_ids.device)
        documents = None if document_end is None else number_documents(input_ids, document_end)
        context = self.context(ragged, FullSequenceAttention(self.config, documents))
        x = self.run_prelude(self.embed_tokens(input_ids.reshape(-1)), context)
        x, counts, record = self.run_recursions(x, context, selection, capacities)
        return self.run_coda(x, context), counts, record

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        labels: Int[Tensor, "b t"] | None = None,
        *,
        targets: Int[Tensor, "b t"] | None = None,
        selection: Selection | None = None,
        capacities: Sequence[float] | None = None,
        document_end: int | None = None,
        return_logits: bool = True,
    ) -> MoROutput:
        """Logits and, with labels or targets, losses.

        Args:
            input_ids: (B, T) token ids.
            labels: (B, T) the ids themselves, shifted in here; -100 does not count.
            targets: (B, T) the next token of each position, already shifted; -100 does not count.
            selection: how expert choice selects: `topk` of the whole sequence (looks ahead) or
                `threshold` (causal). None: `topk` in training mode, `threshold` in evaluation.
            capacities: (R,) instead of the config's, e.g. during capacity warm-up.
            document_end: id that ends a document: attention then stays inside documents. RoPE
                sees distances only, so positions need not start anew. None: it spans them.
            return_logits: False never forms all logits: less memory in training.

        Raises:
            RequestError: the sequence is too long or empty.
        """
        selection = selection or ("topk" if self.training else "threshold")
        hidden, counts, record = self.hidden_states(input_ids, selection, capacities, document_end)
        hidden = self.norm(hidden)
        logits = self.lm_head(hidden).view(*input_ids.shape, -1) if return_logits else None
        loss = total = None
        counted = labels if targets is None else targets
        if counted is not None:
            following = shift_labels(counted) if targets is None else targets
            # Divided by the labels, not by the targets: the reference implementation's mean.
            summed = linear_cross_entropy(hidden, self.lm_head.weight, following.reshape(-1))
            loss = summed / (counted != IGNORE).sum().clamp(min=1)
            total = loss + self.scaled_aux_loss(record.losses)
        return MoROutput(
            logits=logits,
            loss=loss,
            total_loss=total,
            aux_losses=record.losses,
            recursion_counts=counts.view(input_ids.shape),
            selected=record.selected,
            router_accuracy=record.correct,
        )

    def scaled_aux_loss(self, losses: dict[str, Tensor]) -> Tensor | float:
        """Sum of the auxiliary losses, each times its coefficient; 0.0 if there are none."""
        coefficients = {
            "sampling_loss": self.config.aux_loss_coeff,
            "balancing_loss": self.config.balancing_coeff,
            "router_z_loss": self.config.z_loss_coeff,
        }
        return sum((coefficients[name] * loss for name, loss in losses.items()), 0.0)


def _checkpointed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, of which autograd keeps the arguments only and calls it again backward."""
    # Not the re-entrant kind: keys and values that depths share reach a layer by `context`, which
    # is no tensor argument. No state of random numbers is kept: no layer draws any.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def shift_labels(labels: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """(B, T) targets of each position: the label after it, IGNORE (-100) at the last."""
    nothing = torch.full_like(labels[:, :1], IGNORE)
    return torch.cat((labels[:, 1:], nothing), dim=1)
