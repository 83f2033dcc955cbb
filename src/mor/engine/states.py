"""Hidden states of tokens in flight: what a pass of the block does to them, and who goes on.

One row of a buffer, a state slot, for each token; a chunk knows its slots. Between two passes a
router judges each token: `ExpertChoiceStates` by threshold before every pass,
`TokenChoiceStates` once at the start. `FusedExpertChoiceStates` is the first of them in one
compiled call.

Shape letters: N tokens, S state slots, E width.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mor.engine.kernels.cpu_backend import CpuKernels
from mor.engine.kernels.layer_stack import KernelBackend
from mor.engine.request import Chunk
from mor.model.config import MoRConfig
from mor.model.ragged_batch import RaggedBatch
from mor.model.router import (
    ExpertChoiceRouter,
    LinearRouter,
    RecursionLimits,
    TokenChoiceRouter,
)
from mor.model.transformer import MoRModel


class HiddenStates:
    """States of a model without a router: every token takes every pass, which replaces its state.

    Four operations, each in two versions. The plain one takes lists and returns on the host who
    goes on, which waits for the device; the one named `_device` takes and returns tensors, and
    nothing in it waits (multi-step decoding).

    Args:
        hidden: (S, E) the states, a row for each state slot.
    """

    def __init__(self, config: MoRConfig, hidden: Tensor) -> None:
        self.config = config
        self.hidden = hidden

    def write(self, chunks: Sequence[Chunk], x: Float[Tensor, "n e"]) -> list[bool]:
        """Keep the prelude's output for these chunks' tokens; whether each takes its first pass."""
        slots, positions = self._ints(state_slots_of(chunks)), self._ints(positions_of(chunks))
        return _listed(self.write_device(slots, positions, x, self._limits(chunks)), len(x))

    def write_device(
        self,
        slots: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        x: Float[Tensor, "n e"],
        limits: RecursionLimits | None,
    ) -> Bool[Tensor, " n"] | None:
        """Keep the prelude's output; (N,) whether each takes its first pass, None: all do.

        Args:
            limits: only token choice looks at them; expert choice is limited by the scheduler.
        """
        self.hidden.index_copy_(0, slots, x)
        return None

    def read(self, slots: list[int]) -> Float[Tensor, "n e"]:
        """(N, E) a copy of states, the input of a pass."""
        return self.read_device(self._ints(slots))

    def read_device(self, slots: Int[Tensor, " n"]) -> Float[Tensor, "n e"]:
        """(N, E) a copy of states, the input of a pass."""
        return self.hidden.index_select(0, slots)

    def update(
        self,
        slots: list[int],
        depths: list[int],
        positions: Int[Tensor, " n"],
        x: Float[Tensor, "n e"],
    ) -> list[bool]:
        """Bring states up to date after a pass; whether each token takes another one.

        Args:
            depths: passes that each token has behind it.
            x: (N, E) output of the block; may be overwritten.
        """
        flags = self.update_device(self._ints(slots), self._ints(depths), positions, x)
        return _listed(flags, len(slots))

    def update_device(
        self,
        slots: Int[Tensor, " n"],
        depths: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        x: Float[Tensor, "n e"],
    ) -> Bool[Tensor, " n"] | None:
        """Bring states up to date after a pass; (N,) whether each takes another, None: all do."""
        self.hidden.index_copy_(0, slots, x)
        return None

    def read_exiting(self, slots: list[int]) -> Float[Tensor, "n e"]:
        """(N, E) the coda's input for tokens that have left the block."""
        return self.read_exiting_device(self._ints(slots))

    def read_exiting_device(self, slots: Int[Tensor, " n"]) -> Float[Tensor, "n e"]:
        """(N, E) the coda's input for tokens that have left the block."""
        return self.read_device(slots)

    def _limits(self, chunks: Sequence[Chunk]) -> RecursionLimits | None:
        return None

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self.hidden.device)


class ExpertChoiceStates(HiddenStates):
    """States of expert choice by threshold: each pass has a router, which decides and gates it."""

    def __init__(self, config: MoRConfig, hidden: Tensor, router: ExpertChoiceRouter) -> None:
        super().__init__(config, hidden)
        self._router = router
        self._gate = hidden.new_zeros(len(hidden))
        each = map(router.threshold, range(self.config.num_recursions))
        self._thresholds = torch.tensor(list(each), dtype=torch.float64, device=hidden.device)

    def write_device(
        self, slots: Tensor, positions: Tensor, x: Tensor, limits: RecursionLimits | None
    ) -> Tensor:
        self.hidden.index_copy_(0, slots, x)
        return self._judge(torch.zeros_like(slots), x, slots, positions)

    def update_device(self, slots: Tensor, depths: Tensor, positions: Tensor, x: Tensor) -> Tensor:
        before = self.read_device(slots)
        if self.config.gating == "weighted":
            x = torch.addcmul(before, x, self._gate.index_select(0, slots)[:, None])
        else:
            x = x.add_(before)
        self.hidden.index_copy_(0, slots, x)
        # After R passes there is no router: depth R - 1's decision is not looked at.
        return self._judge(depths.clamp(max=self.config.num_recursions - 1), x, slots, positions)

    def _judge(self, depths: Tensor, h: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """(N,) each token's next router's decision; keeps its gate for the pass that follows."""
        main, decision = self._router.logits_at(depths, h, _ragged(positions))
        self._gate.index_copy_(0, slots, self._router.gate(main).to(self._gate.dtype))
        return decision >= self._thresholds.to(decision.dtype)[depths]


class FusedExpertChoiceStates(ExpertChoiceStates):
    """Expert choice with linear routers in one compiled call between two passes (CPU, fp32)."""

    def __init__(self, config: MoRConfig, hidden: Tensor, router: ExpertChoiceRouter) -> None:
        from mor.ops.cpu import router as cpu_router

        super().__init__(config, hidden, router)
        self._ops = ops = cpu_router
        weights = [r.proj.weight for r in router.routers if isinstance(r, LinearRouter)]
        activations = {"sigmoid": ops.SIGMOID, "tanh": ops.TANH, "none": ops.NONE}
        assert config.router_activation is not None
        assert config.router_alpha is not None
        self._routers = ops.LinearRouters(
            weights=torch.cat(weights).numpy(),
            thresholds=self._thresholds.float().numpy(),
            activation=activations[config.router_activation],
            alpha=float(config.router_alpha),
            inverse_temperature=1 / config.router_temperature,
        )
        self._update = ops.ADD_GATED if config.gating == "weighted" else ops.ADD
        self._buffers = ops.StateBuffers(hidden=self.hidden.numpy(), gates=self._gate.numpy())

    def write(self, chunks: Sequence[Chunk], x: Float[Tensor, "n e"]) -> list[bool]:
        return self._route(state_slots_of(chunks), [0] * len(x), x, self._ops.SET)

    def read(self, slots: list[int]) -> Float[Tensor, "n e"]:
        out = np.empty((len(slots), self.hidden.shape[1]), np.float32)
        self._ops.gather(self._buffers.hidden, np.array(slots), out)
        return torch.from_numpy(out)

    def update(
        self, slots: list[int], depths: list[int], positions: Tensor, x: Tensor
    ) -> list[bool]:
        last = self.config.num_recursions - 1  # as in `update_device`
        return self._route(slots, [min(depth, last) for depth in depths], x, self._update)

    def _route(self, slots: list[int], depths: list[int], x: Tensor, how: int) -> list[bool]:
        """Update states (`how`: set, add, add gated) and judge each token by its depth's router."""
        goes_on = np.empty(len(slots), np.bool_)
        update = self._ops.Update(x=x.numpy(), slots=np.array(slots), mode=how)
        self._ops.route(self._buffers, self._routers, update, np.array(depths), goes_on)
        return goes_on.tolist()


class TokenChoiceStates(HiddenStates):
    """States of token choice: a router reads x0, the state before the block, and fixes counts."""

    def __init__(self, config: MoRConfig, hidden: Tensor, router: TokenChoiceRouter) -> None:
        super().__init__(config, hidden)
        self._router = router
        self._start = torch.zeros_like(hidden)  # x0
        self._weight = hidden.new_zeros(len(hidden), 1)
        self._target = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)

    def write_device(
        self, slots: Tensor, positions: Tensor, x: Tensor, limits: RecursionLimits | None
    ) -> None:
        counts, weight = self._router.choose(x, _ragged(positions), None, limits)
        self.hidden.index_copy_(0, slots, x)
        self._start.index_copy_(0, slots, x)
        self._weight.index_copy_(0, slots, weight.to(self._weight.dtype))
        self._target.index_copy_(0, slots, counts)

    def update_device(self, slots: Tensor, depths: Tensor, positions: Tensor, x: Tensor) -> Tensor:
        self.hidden.index_copy_(0, slots, x)
        return self._target.index_select(0, slots) > depths

    def read_exiting_device(self, slots: Tensor) -> Tensor:
        # x0 + w * h (`weighted`), or x0 + h (`additive`)
        h = self.read_device(slots)
        if self.config.gating == "weighted":
            h = h * self._weight.index_select(0, slots)
        return self._start.index_select(0, slots) + h

    def _limits(self, chunks: Sequence[Chunk]) -> RecursionLimits:
        pairs = [
            (c.sequence.min_recursions, c.sequence.max_recursions)
            for c in chunks
            for _ in c.state_slots
        ]
        minimum, maximum = self._ints([a for a, _ in pairs]), self._ints([b for _, b in pairs])
        return RecursionLimits(min_recursions=minimum, max_recursions=maximum)


def make_hidden_states(
    model: MoRModel,
    kernels: KernelBackend,
    num_state_slots: int,
    dtype: torch.dtype,
    device: torch.device,
) -> HiddenStates:
    """The kind of states that a model's router needs, all zero."""
    config = model.config
    hidden = torch.zeros(num_state_slots, config.hidden_size, dtype=dtype, device=device)
    if model.router is None:
        return HiddenStates(config, hidden)
    # Routers compute in the engine's dtype; a copy, since the model stays its owner's.
    router = copy.deepcopy(model.router)
    router.to(device=device, dtype=dtype).eval().requires_grad_(False)
    if isinstance(router, TokenChoiceRouter):
        return TokenChoiceStates(config, hidden, router)
    assert isinstance(router, ExpertChoiceRouter)
    linear = all(isinstance(each, LinearRouter) for each in router.routers)
    if isinstance(kernels, CpuKernels) and linear and not router.aux_routers:
        return FusedExpertChoiceStates(config, hidden, router)
    return ExpertChoiceStates(config, hidden, router)


def state_slots_of(chunks: Sequence[Chunk]) -> list[int]:
    """State slots of all tokens of these chunks."""
    return [slot for chunk in chunks for slot in chunk.state_slots]


def positions_of(chunks: Sequence[Chunk]) -> list[int]:
    """Positions of all tokens of these chunks in their sequences."""
    return [p for chunk in chunks for p in range(chunk.start, chunk.start + len(chunk))]


def _listed(flags: Bool[Tensor, " n"] | None, num: int) -> list[bool]:
    """Flags on the host, True where there are none; waits for the device."""
    return [True] * num if flags is None else flags.tolist()


def _ragged(positions: Tensor) -> RaggedBatch:
    """Tokens at these positions as a batch, for routers, which look at positions only."""
    num = positions.shape[0]
    flat = torch.arange(num, device=positions.device)
    return RaggedBatch(
        token_indices=flat, positions=positions, batch=1, width=num, padded_indices=None
    )
