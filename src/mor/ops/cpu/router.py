"""What lies between two passes of the block, compiled by Numba: gate, router, decision.

The tokens of an engine step are few and wide, and torch would take eight calls for them, each of
which finds the processor's caches full of weights: ten times its time on a quiet desk. One call
does it all.

Shape letters: N tokens, E width, R recursions, P rows of the buffer of states.
"""

from typing import NamedTuple, no_type_check

import numpy as np
from numba import njit

from mor.ops.cpu.cpu_features import FASTMATH

SET, ADD, ADD_GATED = 0, 1, 2
"""What the block gave replaces a token's state, is added to it, or is added times its gate."""
NONE, SIGMOID, TANH = 0, 1, 2
"""Activation of a router's logit that makes the gate."""


class StateBuffers(NamedTuple):
    """The hidden state and the gate of every token in the engine."""

    hidden: np.ndarray
    """(P, E) float32."""
    gates: np.ndarray
    """(P,) float32: what the token's next pass is weighted by."""


class LinearRouters(NamedTuple):
    """One linear router for each depth."""

    weights: np.ndarray
    """(R, E) float32."""
    thresholds: np.ndarray
    """(R,) float32: a token goes on where its logit is not smaller."""
    activation: int
    """NONE, SIGMOID or TANH."""
    alpha: float
    """Factor of the gate; without activation there is none."""
    inverse_temperature: float
    """Factor of the logit."""


class Update(NamedTuple):
    """What prelude or block gave for some tokens."""

    x: np.ndarray
    """(N, E) float32."""
    slots: np.ndarray
    """(N,) int64 rows of the buffers."""
    mode: int
    """SET, ADD or ADD_GATED."""


@njit(nogil=True, cache=True)
@no_type_check
def gather(hidden, slots, out):
    """out[i] = hidden[slots[i]]."""
    for i in range(slots.shape[0]):
        row = slots[i]
        for j in range(out.shape[1]):
            out[i, j] = hidden[row, j]


@njit(nogil=True, cache=True, fastmath=set(FASTMATH))
@no_type_check
def route(states, routers, update, depths, goes_on):
    """Update states and gates, and let each token's next router judge it.

    Args:
        states: `StateBuffers`, changed at `update.slots`.
        routers: `LinearRouters`.
        update: `Update`.
        depths: (N,) whose router comes next.
        goes_on: (N,) gets 1 where the logit is at least the threshold, else 0.
    """
    x, mode = update.x, update.mode
    for i in range(update.slots.shape[0]):
        row, depth = update.slots[i], depths[i]
        factor = states.gates[row] if mode == ADD_GATED else np.float32(1)
        logit = np.float32(0)
        # One pass over the row: the new number is stored, and meets its router's weight.
        for j in range(x.shape[1]):
            value = factor * x[i, j]
            if mode != SET:
                value += states.hidden[row, j]
            states.hidden[row, j] = value
            logit += value * routers.weights[depth, j]
        logit *= np.float32(routers.inverse_temperature)
        gate = logit
        if routers.activation == SIGMOID:
            gate = np.float32(routers.alpha) / (np.float32(1) + np.exp(-logit))
        elif routers.activation == TANH:
            gate = np.float32(routers.alpha) * np.tanh(logit)
        # After the state has been updated with the gate of the pass that ends here.
        states.gates[row] = gate
        goes_on[i] = logit >= routers.thresholds[depth]
