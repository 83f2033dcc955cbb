"""The chunked head and loss against torch's cross-entropy over whole logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mor.ops.cross_entropy import IGNORE, linear_cross_entropy, token_nll

VOCAB, WIDTH = 37, 12
SIZES = [1, 2, 255, 256, 257, 511, 512, 513, 700]  # around the chunk of 256 tokens


def problem(
    num: int, *, ignored: float = 0.2, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, E) hidden states, a (V, E) head and (N,) targets, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (num,), generator=generator)
    targets[torch.rand(num, generator=generator) < ignored] = IGNORE
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def truth(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, reduction=reduction, ignore_index=IGNORE)


def check_against_torch(num: int, ignored: float, seed: int, scale: float) -> None:
    hidden, weight, targets = problem(num, ignored=ignored, seed=seed)
    ours = linear_cross_entropy(hidden, weight, targets)
    theirs = truth(hidden, weight, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    mine = torch.autograd.grad(ours * scale, (hidden, weight))
    right = torch.autograd.grad(theirs * scale, (hidden, weight))
    for a, b in zip(mine, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("num", SIZES)
def test_value_and_gradients_are_torchs(num: int) -> None:
    check_against_torch(num, ignored=0.2, seed=num, scale=1.0)


@given(
    num=st.integers(1, 600),
    ignored=st.sampled_from([0.0, 0.5, 0.99]),
    seed=st.integers(0, 99),
    scale=st.floats(-3, 3),
)
def test_value_and_gradients_of_any_size(num: int, ignored: float, seed: int, scale: float) -> None:
    check_against_torch(num, ignored, seed, scale)


@pytest.mark.parametrize("num", [3, 300])
def test_all_ignored_is_zero_everywhere(num: int) -> None:
    hidden, weight, targets = problem(num, ignored=2.0)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert not grad.any()


def test_an_ignored_token_gives_no_gradient() -> None:
    hidden, weight, targets = problem(300, ignored=0.3)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden)
    assert torch.equal(grad.any(dim=1), targets != IGNORE)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_gradient_alone(wanted: tuple[bool, bool]) -> None:
    hidden, weight, targets = problem(300)
    inputs = [t.detach().requires_grad_(w) for t, w in zip((hidden, weight), wanted, strict=True)]
    linear_cross_entropy(*inputs, targets).backward()
    truth(hidden, weight, targets).backward()
    for mine, right, want in zip(inputs, (hidden, weight), wanted, strict=True):
        assert (mine.grad is None) != want
        if want:
            torch.testing.assert_close(mine.grad, right.grad, rtol=1e-10, atol=1e-11)


def test_no_gradient_at_all() -> None:
    hidden, weight, targets = problem(300)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, truth(hidden, weight, targets).detach())


def test_large_logits_neither_overflow_nor_lose_digits() -> None:
    hidden, weight, targets = problem(300, dtype=torch.float32)
    loss = linear_cross_entropy(hidden * 100, weight * 100, targets)
    right = truth(hidden.double() * 100, weight.double() * 100, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=0)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("num", SIZES)
def test_each_tokens_loss(num: int) -> None:
    hidden, weight, targets = problem(num)
    nll = token_nll(hidden, weight, targets)
    assert nll.shape == (num,)
    assert not nll.requires_grad
    right = truth(hidden, weight, targets, "none").detach()
    torch.testing.assert_close(nll, right, rtol=1e-12, atol=1e-12)
    assert torch.equal(nll == 0, targets == IGNORE)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def test_bf16_states_and_head() -> None:
    hidden, weight, targets = problem(3000, dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    right = truth(*wide, targets)
    assert relative(loss.detach(), right.detach()) < 1e-3
    for mine, true in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(right, wide), strict=True
    ):
        assert mine.dtype == torch.bfloat16
        assert relative(mine, true) < 0.01


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_under_bf16_autocast(states: torch.dtype) -> None:
    """A head in fp32 gets its gradient in fp32, summed over chunks in fp32."""
    hidden, weight, targets = problem(6000, dtype=torch.float32)
    used = hidden.detach().to(states).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(used, weight, targets)
    assert loss.dtype == torch.float32
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    right = truth(*wide, targets)
    assert relative(loss.detach(), right.detach()) < 1e-3
    mine = torch.autograd.grad(loss, (used, weight))
    assert [g.dtype for g in mine] == [states, torch.float32]
    for grad, true in zip(mine, torch.autograd.grad(right, wide), strict=True):
        assert relative(grad, true) < 0.01
