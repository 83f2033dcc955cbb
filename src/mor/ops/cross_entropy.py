"""Cross-entropy of a linear head without ever holding all logits.

The logits of a 49K vocabulary in fp32 are larger than all other activations of a small model. Here
they exist for one chunk of tokens at a time: the forward pass computes a chunk's loss and, where a
gradient will be asked for, at once its gradients, so the backward pass only scales them and no
matrix product is done twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

IGNORE = -100
"""Target of a token that does not count."""

_CHUNK_TOKENS = 256  # tokens whose logits exist at once: 48 MiB in fp32 at 49K words


def _wide_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(N, V) logits in fp32 or wider, whatever the product was computed in."""
    logits = F.linear(hidden, weight)
    return logits if logits.dtype == torch.float64 else logits.float()


def _chunk_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Per token: negative log-likelihood (0 where ignored)."""
    lse = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]  # IGNORE is no index: take 0
    return torch.where(targets == IGNORE, torch.zeros_like(lse), lse - picked)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor
    ) -> Tensor:
        wanted = hidden.requires_grad or weight.requires_grad
        # Evaluation has no gradients: then only losses are computed.
        grad_hidden = torch.empty_like(hidden) if wanted else None
        sums = torch.promote_types(hidden.dtype, torch.float32)  # bf16 would lose small addends
        grad_weight = torch.zeros_like(weight, dtype=sums) if wanted else None
        used = weight.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=sums)
        for start in range(0, hidden.shape[0], _CHUNK_TOKENS):
            rows = slice(start, start + _CHUNK_TOKENS)
            logits = _wide_logits(hidden[rows], used)
            if grad_hidden is None or grad_weight is None:
                total += _chunk_nll(logits, targets[rows]).sum()
                continue
            # d nll / d logits = softmax - one-hot, and nothing for ignored tokens. The logits are
            # passed over as few times as possible: one exponential serves loss and gradient.
            index = targets[rows].clamp(min=0)[:, None]
            maximum = logits.amax(dim=1, keepdim=True)
            picked = logits.gather(1, index) - maximum
            grads = logits.sub_(maximum).exp_()
            sums_exp = grads.sum(dim=1, keepdim=True)
            nll = (sums_exp.log() - picked)[:, 0]
            total += nll.masked_fill(targets[rows] == IGNORE, 0).sum()
            grads.div_(sums_exp)
            grads.scatter_add_(1, index, -torch.ones_like(index, dtype=grads.dtype))
            grads.masked_fill_((targets[rows] == IGNORE)[:, None], 0)
            grads = grads.to(hidden.dtype)
            torch.mm(grads, used, out=grad_hidden[rows])  # (chunk, V) @ (V, E)
            if sums == hidden.dtype:
                grad_weight.addmm_(grads.t(), hidden[rows])
            else:
                grad_weight += grads.t() @ hidden[rows]
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        (scale,) = grads  # of the sum: a scalar
        # In place, since this is when a step holds most: autograd would refuse a second time.
        grad_hidden.mul_(scale.to(grad_hidden.dtype))
        return grad_hidden, grad_weight.mul_(scale.to(grad_weight.dtype)), None


def linear_cross_entropy(
    hidden: Float[Tensor, "n e"], weight: Float[Tensor, "v e"], targets: Int[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target]; IGNORE targets add nothing.

    Under autocast the products are taken in its dtype, sums and softmax in fp32.

    Returns:
        A scalar in fp32 or wider, differentiable (once) in `hidden` and `weight`.
    """
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return _LinearCrossEntropy.apply(hidden, weight, targets)
    hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):  # it would cast some of the products only
        return _LinearCrossEntropy.apply(hidden, weight, targets)


@torch.no_grad()
def token_nll(
    hidden: Float[Tensor, "n e"], weight: Float[Tensor, "v e"], targets: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """(N,) negative log-likelihood of each target in nats, 0 where ignored; no gradient."""
    chunks = zip(hidden.split(_CHUNK_TOKENS), targets.split(_CHUNK_TOKENS), strict=True)
    used = weight.to(hidden.dtype)
    return torch.cat([_chunk_nll(_wide_logits(h, used), t) for h, t in chunks])
