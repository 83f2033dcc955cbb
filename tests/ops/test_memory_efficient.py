"""Norm, rotation and SwiGLU that keep little, against torch's own operations in a row."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mor.bench.train_ab import saved_bytes
from mor.ops.memory_efficient import rms_norm, rotate, swiglu

EPS = 1e-5


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def plain_rotation(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def plain_swiglu(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (gate * gate.sigmoid() * up) @ down.T


def assert_same(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...], accuracy: float) -> None:
    """Values, and gradients under the same uneven weights."""
    near = {"rtol": accuracy, "atol": accuracy}
    torch.testing.assert_close(ours, theirs, **near)
    weights = torch.linspace(-1, 2, ours.numel(), dtype=ours.dtype).view(ours.shape)
    right = torch.autograd.grad((theirs * weights).sum(), inputs)
    mine = torch.autograd.grad((ours * weights).sum(), inputs)
    for a, b in zip(mine, right, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **near)


@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12), (1, 12), (0, 12)])
def test_norm(shape: tuple[int, ...]) -> None:
    x, weight = draw(*shape, seed=0), draw(12, seed=1)
    assert_same(rms_norm(x, weight, EPS), plain_norm(x, weight), (x, weight), 1e-12)


def test_norm_of_nothing_is_nothing() -> None:
    x = torch.zeros(3, 12, requires_grad=True)
    out = rms_norm(x, torch.ones(12), EPS)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert not out.any()
    torch.testing.assert_close(grad, torch.full_like(grad, EPS**-0.5))


def test_norm_of_bf16_is_taken_in_fp32() -> None:
    x, weight = (draw(*s, seed=i, dtype=torch.bfloat16) for i, s in enumerate([(64, 256), (256,)]))
    ours = rms_norm(x, weight, EPS)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, F.rms_norm(x, (256,), weight, EPS), rtol=0.01, atol=0.01)
    ours.float().square().mean().backward()
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    plain_norm(*wide).square().mean().backward()
    for mine, right in zip((x, weight), wide, strict=True):
        assert mine.grad is not None
        assert right.grad is not None
        assert mine.grad.dtype == torch.bfloat16
        assert (mine.grad.double() - right.grad).norm() < 0.01 * right.grad.norm()


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rotation(heads: int, dtype: torch.dtype) -> None:
    """In place where the angles have the same dtype, else (as under autocast) in the wider one."""
    x, angles = draw(5, heads * 8, seed=0, dtype=dtype), draw(5, 1, 4, seed=1).detach()
    ours = rotate(x * 1, angles.cos(), angles.sin())
    assert ours.dtype == torch.float64
    theirs = plain_rotation(x.view(5, heads, 8), angles).view(5, -1)
    assert_same(ours, theirs, (x,), 1e-12 if dtype == torch.float64 else 1e-6)


def test_rotation_overwrites_its_argument() -> None:
    x, angles = draw(5, 24, seed=0).detach(), draw(5, 1, 4, seed=1).detach()
    expected = plain_rotation(x.view(5, 3, 8), angles)
    assert rotate(x, angles.cos(), angles.sin()).data_ptr() == x.data_ptr()
    torch.testing.assert_close(x.view(5, 3, 8), expected)


@pytest.mark.parametrize("num", [1, 9])
def test_swiglu(num: int) -> None:
    gate, up, down = draw(num, 20, seed=0), draw(num, 20, seed=1), draw(6, 20, seed=2)
    ours = swiglu(gate, up, lambda inner: F.linear(inner, down))
    assert_same(ours, plain_swiglu(gate, up, down), (gate, up, down), 1e-12)


def test_swiglu_takes_no_matrix_product_again() -> None:
    gate, up, down = draw(9, 20, seed=0), draw(9, 20, seed=1), draw(6, 20, seed=2)
    with FlopCounterMode(display=False) as counter:
        swiglu(gate, up, lambda inner: F.linear(inner, down)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 9 * 20 * 6  # forward, by `inner`, by `down`


def test_what_is_kept() -> None:
    """The inputs; of the norm one number a row more."""
    x, weight = draw(50, 12, seed=0), draw(12, seed=1)
    assert saved_bytes(lambda: rms_norm(x, weight, EPS), [weight]) == x.nbytes + 50 * 8
    gate, up, down = draw(50, 20, seed=0), draw(50, 20, seed=1), draw(12, 20, seed=2)
    kept = saved_bytes(lambda: swiglu(gate, up, lambda inner: F.linear(inner, down)), [down])
    assert kept == gate.nbytes + up.nbytes
    angles = draw(50, 1, 4, seed=1).detach()
    turned = saved_bytes(lambda: rotate(gate[:, :16] * 1, angles.cos(), angles.sin()), [])
    assert turned == 2 * angles.nbytes
