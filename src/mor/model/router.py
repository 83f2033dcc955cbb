"""Routers: which tokens take another recursion, and the weight of what it adds.

Expert choice (arXiv 2507.10524, section 2.2.1; Zhou et al., arXiv 2202.09368) has one router per
depth, and each depth selects among the tokens of the depth before. Token choice has one router that
fixes every token's recursion count at the start. What a mixture of experts calls an expert is here
a depth.

Shape letters: B batch, T time, N present tokens, W tokens per sequence, R recursions, E width.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mor.model.config import MoRConfig
from mor.model.ragged_batch import RaggedBatch

Selection = Literal["topk", "threshold"]


class LinearRouter(nn.Module):
    """z = W x, without bias."""

    def __init__(self, config: MoRConfig, num_outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, num_outputs, bias=False)

    def forward(self, x: Float[Tensor, "n e"], positions: Tensor) -> Float[Tensor, "n out"]:
        """(N, outputs) logits."""
        return self.proj(x)


class MLPRouter(nn.Module):
    """z = W2 gelu(W1 x), without biases; W1 is (2 E, E)."""

    def __init__(self, config: MoRConfig, num_outputs: int) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.down = nn.Linear(2 * config.hidden_size, num_outputs, bias=False)

    def forward(self, x: Float[Tensor, "n e"], positions: Tensor) -> Float[Tensor, "n out"]:
        """(N, outputs) logits."""
        return self.down(F.gelu(self.up(x)))


class RandomRouter(nn.Module):
    """z = logit(u) with u uniform in (0, 1), whatever x is: the baseline of learned routers.

    Fresh draws in training; in evaluation a fixed function of depth and position, so that
    generation with a cache, recomputation and any batching agree.
    """

    def __init__(self, config: MoRConfig, num_outputs: int, depth: int = 0) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.depth = depth

    def forward(self, x: Float[Tensor, "n e"], positions: Tensor) -> Float[Tensor, "n out"]:
        """(N, outputs) logits."""
        if self.training:
            uniform = torch.rand(x.shape[0], self.num_outputs, device=x.device)
        else:
            # frac(43758.5453 sin(12.9898 a + 78.233 b + ..)), a hash that shaders use. In float64:
            # the fraction is what the product has beyond its first five digits.
            salt = torch.arange(self.num_outputs, device=x.device) * 78.233 + self.depth * 37.719
            mixed = torch.sin(positions[:, None].double() * 12.9898 + salt.double()) * 43758.5453
            uniform = (mixed - mixed.floor()).float()
        return torch.logit(uniform, eps=1e-6).to(x.dtype)


def build_router(config: MoRConfig, num_outputs: int, depth: int = 0) -> nn.Module:
    """A router of `config.router_type` with this many logits per token.

    Args:
        depth: at which it decides; the random router draws others at each.
    """
    if config.router_type == "random":
        return RandomRouter(config, num_outputs, depth)
    return {"linear": LinearRouter, "mlp": MLPRouter}[config.router_type](config, num_outputs)


def capacity_at_step(capacity: float, step: int, warmup_steps: int) -> float:
    """Capacity at a training step: falls from 1 to `capacity` along half a cosine (section 3.1).

    A pure function of the trainer's step, so that a resumed run and a copied module agree.
    """
    if warmup_steps <= 0:
        return capacity
    return capacity + (1 - capacity) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / warmup_steps)))


@dataclass
class RoutingOutput:
    """What the routers of one forward pass decided, and their losses; filled depth by depth."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    """Unscaled: `sampling_loss`, `balancing_loss`, `router_z_loss`, where the config has them."""
    selected: list[Tensor] = field(default_factory=list)
    """Expert choice by `topk`: for each depth the (B, k_r) selected positions, in time order. Empty
    where sequences differ in length."""
    correct: list[Tensor] = field(default_factory=list)
    """Expert choice by `topk`: for each depth that left tokens out, the share of candidates on
    which the `threshold` rule agrees."""
    decisions: list[Tensor] = field(default_factory=list)
    """Expert choice by `threshold`: for each depth the (candidates,) logits of the decision."""

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add to the sum, over depths, of the loss of this name."""
        self.losses[name] = self.losses[name] + value if name in self.losses else value


@dataclass(frozen=True, kw_only=True)
class RecursionLimits:
    """Bounds on each token's passes of the block that overrule the router.

    Indexed like the hidden states of the whole batch: by `RaggedBatch.token_indices`.
    """

    min_recursions: Int[Tensor, " n"]
    """(N,) lower bound; 0 leaves it to the router."""
    max_recursions: Int[Tensor, " n"]
    """(N,) upper bound, 1..R."""


@dataclass(frozen=True, kw_only=True)
class Selected:
    """The M candidates that expert choice selected at one depth."""

    ragged: RaggedBatch
    indices: Int[Tensor, " m"] | None
    """(M,) their rows among the candidates; None if all were selected."""
    gate: Float[Tensor, "m 1"]
    """g = alpha * activation(logit), by which the block's update is multiplied."""


def _upcast(logits: Tensor) -> Tensor:
    """The logits in fp32 or wider: bf16 would tie logits that must be ranked."""
    return logits if logits.dtype == torch.float64 else logits.float()


def num_selected(fraction: float, ragged: RaggedBatch) -> int | Int[Tensor, " b"]:
    """k_r = max(1, floor(fraction * length)); (B,) if the sequences differ in length."""
    if ragged.padded_indices is None:
        return max(1, int(fraction * ragged.width))
    return (fraction * ragged.lengths.double()).long().clamp(min=1)


def _among_best(
    score: Float[Tensor, " n"], ragged: RaggedBatch, num: Int[Tensor, " b"]
) -> Bool[Tensor, " n"]:
    """(N,) whether a token's score is among the `num` highest of its sequence."""
    # Two stable sorts: by score, then by sequence; each sequence's tokens are then ranked.
    order = score.argsort(descending=True)
    order = order[ragged.sequence_ids[order].argsort(stable=True)]
    rows, lengths = ragged.sequence_ids[order], ragged.lengths
    rank = torch.arange(len(order), device=order.device) - (lengths.cumsum(0) - lengths)[rows]
    return torch.empty_like(order, dtype=torch.bool).index_copy(0, order, rank < num[rows])


class ExpertChoiceRouter(nn.Module):
    """One router per depth r; its top k_r (or above tau_r) of the tokens at depth r - 1 go on.

    h_{r+1} = h_r + g_r f(h_r), with g_r = alpha * activation(z_r / temperature), for selected
    tokens; the others keep h_r (arXiv 2507.10524, section 2.2.1).
    """

    def __init__(self, config: MoRConfig) -> None:
        super().__init__()
        self.config = config
        depths = range(config.num_recursions)
        self.routers = nn.ModuleList(build_router(config, 1, r) for r in depths)
        auxiliary = config.selection_training == "aux_router"
        self.aux_routers = nn.ModuleList(build_router(config, 1, r) for r in depths if auxiliary)

    def gate(self, logits: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """(N,) g = alpha * activation(logit); the logit itself with activation `none`."""
        assert self.config.router_alpha is not None
        if self.config.router_activation == "none":
            return logits
        squash = torch.sigmoid if self.config.router_activation == "sigmoid" else torch.tanh
        return self.config.router_alpha * squash(logits)

    def threshold(self, depth: int) -> float:
        """tau_r, the lowest logit that goes on to depth r; -inf at depth 0 if its capacity is 1."""
        assert self.config.thresholds is not None
        assert self.config.capacities is not None
        if depth == 0 and self.config.capacities[0] == 1:
            return -math.inf
        return self.config.thresholds[depth]

    def logits(
        self, depth: int, x: Float[Tensor, "n e"], ragged: RaggedBatch
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """(N,) logits of the gate, and (N,) logits of the causal decision at one depth.

        They are the same without `selection_training='aux_router'`.
        """
        scaled = x / self.config.router_temperature if self.config.router_temperature != 1 else x
        main = _upcast(self.routers[depth](scaled, ragged.positions))[:, 0]
        if not self.aux_routers:
            return main, main
        # Detached: the second router learns to imitate the selection and shapes nothing else.
        return main, _upcast(self.aux_routers[depth](x.detach(), ragged.positions))[:, 0]

    def logits_at(
        self, depths: Int[Tensor, " n"], x: Float[Tensor, "n e"], ragged: RaggedBatch
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """The two `logits` of tokens that are at different depths.

        Args:
            depths: (N,) depth of each token, 0..R - 1.
        """
        linear = [r.proj.weight for r in self.routers if isinstance(r, LinearRouter)]
        if linear and not self.aux_routers:
            # One (N, E) x (E, R) product of which each token takes its depth's column.
            scaled = (
                x if self.config.router_temperature == 1 else x / self.config.router_temperature
            )
            main = _upcast(F.linear(scaled, torch.cat(linear))).gather(1, depths[:, None])[:, 0]
            return main, main
        # Every router computes all N logits: sorting tokens by depth would need the host to wait.
        judged = [self.logits(r, x, ragged) for r in range(self.config.num_recursions)]
        main, decision = (torch.stack(each, 1) for each in zip(*judged, strict=True))
        return main.gather(1, depths[:, None])[:, 0], decision.gather(1, depths[:, None])[:, 0]

    def choose(
        self,
        depth: int,
        x: Float[Tensor, "n e"],
        ragged: RaggedBatch,
        topk: int | Int[Tensor, " b"] | None,
        record: RoutingOutput,
        limits: RecursionLimits | None = None,
    ) -> Selected:
        """Select among the candidates: the N tokens that were at the depth before.

        Args:
            x: (N, E) their states.
            topk: k_r of the `topk` rule, (B,) if the sequences differ in length; None applies the
                `threshold` rule.
            record: gets the losses and the selection.
            limits: under `threshold`, who goes on or stops at this depth whatever its logit.
        """
        main, decision = self.logits(depth, x, ragged)
        gate = self.gate(main)
        if topk is None:
            record.decisions.append(decision.detach())
            goes_on = decision.detach() >= self.threshold(depth)
            if limits is not None:
                # Depth d is pass d + 1: a minimum of m forces depths 0 .. m - 1.
                minimum = limits.min_recursions[ragged.token_indices]
                maximum = limits.max_recursions[ragged.token_indices]
                goes_on = (goes_on | (depth < minimum)) & (depth < maximum)
            chosen, rows = ragged.select(goes_on)
        else:
            assert limits is None, "topk sends a fixed number of tokens to each depth"
            # Ranked by the gate, which the main router is trained through, also with `aux_router`.
            if isinstance(topk, int):
                scores = gate.detach().view(ragged.batch, ragged.width)  # (B, W)
                num = min(topk, ragged.width)
                # Sorted by index: time order is what makes attention among them causal.
                index = scores.topk(num, dim=1, sorted=False).indices.sort(dim=1).values
                chosen, rows = ragged.select_per_sequence(index)
                record.selected.append(chosen.positions.view(chosen.batch, chosen.width))
            else:
                chosen, rows = ragged.select(_among_best(gate.detach(), ragged, topk))
            self._record(depth, main, decision, rows, record)
        if rows.shape[0] == ragged.num_tokens:
            return Selected(ragged=ragged, indices=None, gate=gate[:, None])
        return Selected(ragged=chosen, indices=rows, gate=gate[rows][:, None])

    def _record(
        self,
        depth: int,
        main: Tensor,
        decision: Tensor,
        rows: Tensor,
        record: RoutingOutput,
    ) -> None:
        """Add one depth's losses, and how often the `threshold` rule agrees with `topk`."""
        was_selected = torch.zeros_like(decision).index_fill(0, rows, 1.0)
        if self.config.selection_training != "none":
            bce = F.binary_cross_entropy_with_logits(decision, was_selected)
            record.add_loss("sampling_loss", bce)
        if self.config.z_loss_coeff:
            record.add_loss("router_z_loss", main.square().mean())  # logsumexp over one logit
        if len(rows) < len(decision):  # else there was nothing to decide
            agrees = (decision >= self.threshold(depth)) == (was_selected > 0)
            record.correct.append(agrees.float().mean().detach())


class TokenChoiceRouter(nn.Module):
    """One router before the block: argmax_r p_r is the last depth of a token, p_r the weight.

    y = x + p_r f^(r+1)(x), with p = alpha * softmax(z) or alpha * sigmoid(z) (arXiv 2507.10524,
    section 2.2.1).
    """

    bias: Tensor
    """(R,) added to p for the choice only, with `balancing='loss_free'`."""

    def __init__(self, config: MoRConfig) -> None:
        super().__init__()
        self.config = config
        self.router = build_router(config, config.num_recursions)
        if config.balancing == "loss_free":
            self.register_buffer("bias", torch.zeros(config.num_recursions))

    def choose(
        self,
        x: Float[Tensor, "n e"],
        ragged: RaggedBatch,
        record: RoutingOutput | None,
        limits: RecursionLimits | None = None,
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, "n 1"]]:
        """(N,) recursion counts 1..R, within the limits, and (N, 1) the weight p of each token.

        Args:
            record: gets the losses; None computes none.
        """
        config = self.config
        assert config.router_alpha is not None
        logits = _upcast(self.router(x / config.router_temperature, ragged.positions))
        softmax = config.router_activation == "softmax"
        squashed = logits.softmax(-1) if softmax else logits.sigmoid()
        probs = config.router_alpha * squashed
        score = probs + self.bias if config.balancing == "loss_free" else probs
        choice = score.argmax(-1)
        if limits is not None:
            choice = choice.clamp(limits.min_recursions - 1, limits.max_recursions - 1)
        if record is not None and config.balancing == "loss":
            # R * sum_r f_r * mean(p_r), as in Switch Transformer (arXiv 2101.03961, equation 4).
            fractions = self.fractions(choice + 1)
            balance = (probs.mean(0) * fractions * config.num_recursions).sum()
            record.add_loss("balancing_loss", balance)
        if record is not None and config.z_loss_coeff:
            record.add_loss("router_z_loss", logits.logsumexp(-1).square().mean())
        return choice + 1, probs.gather(1, choice[:, None])

    def fractions(self, counts: Int[Tensor, " n"]) -> Float[Tensor, " r"]:
        """(R,) share of the tokens with 1, .. R recursions."""
        num = self.config.num_recursions
        return torch.bincount(counts - 1, minlength=num).to(torch.float32) / max(1, len(counts))

    @torch.no_grad()
    def update_bias(self, fractions: Float[Tensor, " r"], strength: float = 1.0) -> None:
        """Raise the bias of depths with too few tokens, lower the others', by the configured rate.

        Loss-free balancing (Wang et al., arXiv 2408.15664), once after each optimizer step.

        Args:
            fractions: (R,) share of tokens by count, averaged over the step's micro-batches.
            strength: factor of the rate, e.g. while it warms up.
        """
        assert self.config.balancing == "loss_free"
        rate = strength * self.config.balancing_update_rate
        self.bias += rate * torch.sign(fractions.mean() - fractions)
