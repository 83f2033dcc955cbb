"""What lies between two passes of the block, compiled by Numba: gate, router, decision.

A tick's tokens are few and wide, and torch would take eight calls for them, each of which finds the
processor's caches full of weights: ten times its time on a quiet desk. One call does it all.

Shape letters: N tokens, E width, R recursions, P rows of the buffer of states.
"""

from typing import no_type_check

import numpy as np
from numba import njit

SET, ADD, ADD_GATED = 0, 1, 2
"""What the block gave replaces a token's state, is added to it, or is added times its gate."""
NONE, SIGMOID, TANH = 0, 1, 2
_SAFE = frozenset(("reassoc", "contract", "nsz", "arcp"))  # fast math, but infinities stay


@njit(nogil=True, cache=True)
@no_type_check
def gather(states, rows, out):
    """out[i] = states[rows[i]]."""
    for i in range(rows.shape[0]):
        row = rows[i]
        for j in range(out.shape[1]):
            out[i, j] = states[row, j]


@njit(nogil=True, cache=True, fastmath=set(_SAFE))
@no_type_check
def route(states, gates, rows, x, how, depths, routers, squash, goes_on):
    """Bring states up to date, and let each token's next router judge it.

    Args:
        states, gates: (P, E), (P): changed at `rows`.
        rows: (N).
        x: (N, E) what prelude or block gave.
        how: SET, ADD or ADD_GATED.
        depths: (N) whose router comes next.
        routers: weights (R, E), thresholds (R).
        squash: activation, alpha, 1 / temperature.
        goes_on: (N) gets 1 where the logit is at least the threshold, else 0.
    """
    (weights, thresholds), (activation, alpha, inverse) = routers, squash
    for i in range(rows.shape[0]):
        row, depth = rows[i], depths[i]
        factor = gates[row] if how == ADD_GATED else np.float32(1)
        logit = np.float32(0)
        for j in range(x.shape[1]):
            value = factor * x[i, j]
            if how != SET:
                value += states[row, j]
            states[row, j] = value
            logit += value * weights[depth, j]
        logit *= np.float32(inverse)
        gate = logit
        if activation == SIGMOID:
            gate = np.float32(alpha) / (np.float32(1) + np.exp(-logit))
        elif activation == TANH:
            gate = np.float32(alpha) * np.tanh(logit)
        gates[row] = gate
        goes_on[i] = logit >= thresholds[depth]
