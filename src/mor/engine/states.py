"""Hidden states of tokens in flight: what a pass of the block does to them, and who goes on.

One row of a buffer for each token; a chunk knows its rows. Between two passes a router judges each
token: `ExpertChoiceStates` by threshold before every pass, `TokenChoiceStates` once at the start.
`FusedExpertChoiceStates` is the first of them in one compiled call.

Shape letters: N tokens, E width.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mor.engine.layer_stack import CpuKernels, KernelBackend
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
    """Without a router: every pass replaces a state, and every token takes every pass.

    `enter`, `take`, `advance` and `leave` are for the host, which reads back who goes on; beneath
    them `arrive`, `at`, `passed` and `left` leave everything on the device.
    """

    def __init__(self, config: MoRConfig, hidden: Tensor) -> None:
        self.config = config
        self.hidden = hidden

    def enter(self, chunks: Sequence[Chunk], x: Float[Tensor, "n e"]) -> list[bool]:
        """Keep what the prelude gave for the tokens of these chunks; who takes the first pass."""
        slots, positions = self._ints(state_slots_of(chunks)), self._ints(positions_of(chunks))
        return _listed(self.arrive(slots, positions, x, self._limits(chunks)), len(x))

    def take(self, slots: list[int]) -> Float[Tensor, "n e"]:
        """A copy of states, for a pass."""
        return self.at(self._ints(slots))

    def advance(
        self,
        slots: list[int],
        depths: list[int],
        positions: Int[Tensor, " n"],
        x: Float[Tensor, "n e"],
    ) -> list[bool]:
        """Bring states up to date after a pass; who takes another one.

        Args:
            depths: passes that each token has behind it.
            x: what the block gave; may be overwritten.
        """
        return _listed(self.passed(self._ints(slots), self._ints(depths), positions, x), len(slots))

    def leave(self, slots: list[int]) -> Float[Tensor, "n e"]:
        """(N, E) what goes into the coda."""
        return self.left(self._ints(slots))

    def arrive(
        self,
        slots: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        x: Float[Tensor, "n e"],
        limits: RecursionLimits | None,
    ) -> Bool[Tensor, " n"] | None:
        """As `enter`; None: all do. Only token choice looks at the limits."""
        self.hidden.index_copy_(0, slots, x)
        return None

    def at(self, slots: Int[Tensor, " n"]) -> Float[Tensor, "n e"]:
        """As `take`."""
        return self.hidden.index_select(0, slots)

    def passed(
        self,
        slots: Int[Tensor, " n"],
        depths: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        x: Float[Tensor, "n e"],
    ) -> Bool[Tensor, " n"] | None:
        """As `advance`; None: all do."""
        self.hidden.index_copy_(0, slots, x)
        return None

    def left(self, slots: Int[Tensor, " n"]) -> Float[Tensor, "n e"]:
        """As `leave`."""
        return self.at(slots)

    def _limits(self, chunks: Sequence[Chunk]) -> RecursionLimits | None:
        return None

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self.hidden.device)


class ExpertChoiceStates(HiddenStates):
    """Expert choice by threshold: before each pass a router says who takes it, and its gate."""

    def __init__(self, config: MoRConfig, hidden: Tensor, router: ExpertChoiceRouter) -> None:
        super().__init__(config, hidden)
        self._router = router
        self._gate = hidden.new_zeros(len(hidden))
        each = map(router.threshold, range(self.config.num_recursions))
        self._thresholds = torch.tensor(list(each), dtype=torch.float64, device=hidden.device)

    def arrive(
        self, slots: Tensor, positions: Tensor, x: Tensor, limits: RecursionLimits | None
    ) -> Tensor:
        """See `HiddenStates.arrive`."""
        self.hidden.index_copy_(0, slots, x)
        return self._judge(torch.zeros_like(slots), x, slots, positions)

    def passed(self, slots: Tensor, depths: Tensor, positions: Tensor, x: Tensor) -> Tensor:
        """See `HiddenStates.passed`."""
        before = self.at(slots)
        if self.config.gating == "weighted":
            x = torch.addcmul(before, x, self._gate.index_select(0, slots)[:, None])
        else:
            x = x.add_(before)
        self.hidden.index_copy_(0, slots, x)
        # Who is through has no router any more.
        return self._judge(depths.clamp(max=self.config.num_recursions - 1), x, slots, positions)

    def _judge(self, depths: Tensor, h: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        main, decision = self._router.logits_at(depths, h, _ragged(positions))
        self._gate.index_copy_(0, slots, self._router.gate(main).to(self._gate.dtype))
        return decision >= self._thresholds.to(decision.dtype)[depths]


class FusedExpertChoiceStates(ExpertChoiceStates):
    """Expert choice with linear routers, compiled for CPUs; fp32."""

    def __init__(self, config: MoRConfig, hidden: Tensor, router: ExpertChoiceRouter) -> None:
        from mor.ops.cpu import router as cpu_route

        super().__init__(config, hidden, router)
        self._ops = ops = cpu_route
        weights = [r.proj.weight for r in router.routers if isinstance(r, LinearRouter)]
        self._routers = torch.cat(weights).numpy(), self._thresholds.float().numpy()
        squash = {"sigmoid": ops.SIGMOID, "tanh": ops.TANH, "none": ops.NONE}
        assert config.router_activation is not None
        assert config.router_alpha is not None
        activation = squash[config.router_activation]
        self._squash = activation, float(config.router_alpha), 1 / config.router_temperature
        self._update = ops.ADD_GATED if config.gating == "weighted" else ops.ADD
        self._memory = self.hidden.numpy(), self._gate.numpy()

    def enter(self, chunks: Sequence[Chunk], x: Float[Tensor, "n e"]) -> list[bool]:
        """See `HiddenStates.enter`."""
        return self._route(state_slots_of(chunks), [0] * len(x), x, self._ops.SET)

    def take(self, slots: list[int]) -> Float[Tensor, "n e"]:
        """See `HiddenStates.take`."""
        out = np.empty((len(slots), self.hidden.shape[1]), np.float32)
        self._ops.gather(self._memory[0], np.array(slots), out)
        return torch.from_numpy(out)

    def advance(
        self, slots: list[int], depths: list[int], positions: Tensor, x: Tensor
    ) -> list[bool]:
        """See `HiddenStates.advance`."""
        last = self.config.num_recursions - 1  # who is through has no router any more
        return self._route(slots, [min(depth, last) for depth in depths], x, self._update)

    def _route(self, slots: list[int], depths: list[int], x: Tensor, how: int) -> list[bool]:
        goes_on = np.empty(len(slots), np.bool_)
        self._ops.route(
            *(*self._memory, np.array(slots), x.numpy(), how, np.array(depths)),
            *(self._routers, self._squash, goes_on),
        )
        return goes_on.tolist()


class TokenChoiceStates(HiddenStates):
    """Token choice: a router reads the state before the block and fixes the number of passes."""

    def __init__(self, config: MoRConfig, hidden: Tensor, router: TokenChoiceRouter) -> None:
        super().__init__(config, hidden)
        self._router = router
        self._start = torch.zeros_like(hidden)  # x0
        self._weight = hidden.new_zeros(len(hidden), 1)
        self._target = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)

    def arrive(
        self, slots: Tensor, positions: Tensor, x: Tensor, limits: RecursionLimits | None
    ) -> None:
        """See `HiddenStates.arrive`."""
        counts, weight = self._router.choose(x, _ragged(positions), None, limits)
        self.hidden.index_copy_(0, slots, x)
        self._start.index_copy_(0, slots, x)
        self._weight.index_copy_(0, slots, weight.to(self._weight.dtype))
        self._target.index_copy_(0, slots, counts)

    def passed(self, slots: Tensor, depths: Tensor, positions: Tensor, x: Tensor) -> Tensor:
        """See `HiddenStates.passed`."""
        self.hidden.index_copy_(0, slots, x)
        return self._target.index_select(0, slots) > depths

    def left(self, slots: Tensor) -> Tensor:
        """See `HiddenStates.left`: x0 + w * h, or x0 + h."""
        h = self.at(slots)
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
    """The states of a model's tokens."""
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
    """Rows of all tokens of these chunks."""
    return [row for chunk in chunks for row in chunk.state_slots]


def positions_of(chunks: Sequence[Chunk]) -> list[int]:
    """Positions of all tokens of these chunks in their sequences."""
    return [p for chunk in chunks for p in range(chunk.start, chunk.start + len(chunk))]


def _listed(flags: Bool[Tensor, " n"] | None, num: int) -> list[bool]:
    """On the host: this waits for the device."""
    return [True] * num if flags is None else flags.tolist()


def _ragged(positions: Tensor) -> RaggedBatch:
    """Some tokens, for routers: they look at positions only."""
    num = positions.shape[0]
    flat = torch.arange(num, device=positions.device)
    return RaggedBatch(
        token_indices=flat, positions=positions, batch=1, width=num, padded_indices=None
    )
