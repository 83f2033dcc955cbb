"""Parts of a layer that keep less for the backward pass, and pass over memory fewer times.

What autograd keeps of norm, rotation and SwiGLU as torch's own operations is half of a training
step's activations. Here they keep their inputs, which others keep anyway, and little else.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, x: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        (grad,) = grads
        # y = w u with u = x / rms(x): dx = (g - u mean(g u)) / rms(x), g = w dy; dw = sum(dy u).
        unit = x * scale
        grad_x = grad * weight.to(unit.dtype)
        along = (grad_x * unit).mean(-1, keepdim=True)
        grad_weight = (grad * unit).view(-1, x.shape[-1]).sum(0)
        grad_x.addcmul_(unit, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def rms_norm(
    x: Float[Tensor, "*n e"], weight: Float[Tensor, " e"], eps: float
) -> Float[Tensor, "*n e"]:
    """x / rms(x) * weight, the mean square taken in fp32 or wider (Zhang and Sennrich, 2019)."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # one kernel there
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return _RMSNorm.apply(x, weight, eps)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(N, H * D) heads, rotated in a new array."""
    first, second = x.view(len(x), -1, 2, cos.shape[-1]).unbind(2)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), 2).view(x.shape)


def _rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(N, H * D) heads, rotated in their own memory."""
    first, second = x.view(len(x), -1, 2, cos.shape[-1]).unbind(2)
    was = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(was, sin)
    return x


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.mark_dirty(x)
        return _rotate_in_place(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # The inverse of a rotation is its transpose: the opposite angle.
        return _rotate_in_place(grads[0].clone(), cos, -sin), None, None


def rotate(
    x: Float[Tensor, "n hd"], cos: Float[Tensor, "n 1 half"], sin: Float[Tensor, "n 1 half"]
) -> Float[Tensor, "n hd"]:
    """RoPE of queries or keys; x may be overwritten.

    First and second half of a head form the pairs, as in Llama.
    """
    if x.dtype != cos.dtype or torch.compiler.is_compiling():
        return _rotated(x, cos, sin)
    return _Rotate.apply(x, cos, sin)


class _SiluTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (grad,) = grads
        inner = grad * up  # gradient of silu(gate), then of gate
        torch.ops.aten.silu_backward.grad_input(inner, gate, grad_input=inner)
        return inner, F.silu(gate).mul_(grad)


def swiglu(
    gate: Float[Tensor, "n i"], up: Float[Tensor, "n i"], down: Callable[[Tensor], Tensor]
) -> Float[Tensor, "n e"]:
    """down(silu(gate) * up) (Shazeer, 2020); `down` is linear.

    Keeps `gate` and `up` only. The backward pass takes their product again, but not that of `down`:
    recomputation ends as soon as all that is needed is there.
    """

    def combine(gate: Tensor, up: Tensor) -> Tensor:
        return down(_SiluTimes.apply(gate, up))

    if torch.compiler.is_compiling():  # it chooses itself what to keep
        return down(F.silu(gate) * up)
    if not torch.is_grad_enabled():
        return combine(gate, up)
    return checkpoint(combine, gate, up, use_reentrant=False, preserve_rng_state=False)
