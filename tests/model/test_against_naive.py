"""The packed model equals the naive one, and no token sees the future."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mor.model.config import MoRConfig
from reference_model import Naive
from tiny import KINDS, build, configs, tiny_model


def _ids(seed: int, batch: int, time: int) -> torch.Tensor:
    return torch.randint(0, 61, (batch, time), generator=torch.Generator().manual_seed(seed))


def check_against_naive(config: MoRConfig, selection: str, seed: int) -> None:
    model = build(config, seed)
    ids = _ids(seed, 2, 17)
    out = model(ids, labels=ids, selection=selection)
    for row in range(2):
        naive = Naive(model, selection)
        logits, counts = naive.logits(ids[row])
        torch.testing.assert_close(out.logits[row], logits, rtol=1e-9, atol=1e-9)
        assert out.recursion_counts[row].tolist() == counts.tolist()
        assert [s[row].tolist() for s in out.selected] == naive.selected


@given(config=configs(), selection=st.sampled_from(["topk", "threshold"]), seed=st.integers(0, 99))
def test_forward_equals_naive(config: MoRConfig, selection: str, seed: int) -> None:
    check_against_naive(config, selection, seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", ["topk", "threshold"])
def test_every_kind_equals_naive(kind: str, selection: str) -> None:
    check_against_naive(tiny_model(kind).config, selection, seed=7)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_equal_naive(kind: str) -> None:
    model = tiny_model(kind)
    ids = _ids(3, 1, 16)
    out = model(ids, labels=ids, selection="topk")
    naive = Naive(model, "topk")
    logits, _ = naive.logits(ids[0])
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum") / 16
    assert out.aux_losses.keys() == naive.losses.keys()
    for name, value in naive.losses.items():
        torch.testing.assert_close(out.aux_losses[name], value, rtol=1e-6, atol=1e-8)
    total = loss + model.scaled_aux_loss(naive.losses)
    torch.testing.assert_close(out.total_loss, total, rtol=1e-6, atol=1e-8)
    used = [p for _, p in sorted(model.named_parameters())]
    ours = torch.autograd.grad(out.total_loss, used, allow_unused=True)
    theirs = torch.autograd.grad(total, used, allow_unused=True)
    for mine, truth in zip(ours, theirs, strict=True):
        assert (mine is None) == (truth is None)
        if mine is not None:
            torch.testing.assert_close(mine, truth, rtol=1e-6, atol=1e-9)


@given(config=configs(), seed=st.integers(0, 99), changed=st.integers(1, 16))
def test_a_token_does_not_move_logits_before_it(config: MoRConfig, seed: int, changed: int) -> None:
    model = build(config, seed)
    ids = _ids(seed, 1, 17)
    other = ids.clone()
    other[0, changed] = (other[0, changed] + 1) % 61
    before, after = model(ids), model(other)
    gap = (before.logits[:, :changed] - after.logits[:, :changed]).abs().max()
    assert gap < 1e-10
    same = before.recursion_counts[:, :changed] == after.recursion_counts[:, :changed]
    assert same.all()
    assert (before.logits[:, changed] != after.logits[:, changed]).any()


def test_topk_does_look_ahead() -> None:
    """The rule that the causality test would catch: top-k over the whole sequence leaks."""
    model = tiny_model("expert")
    moved = 0.0
    for seed in range(5):
        ids = _ids(seed, 1, 17)
        other = ids.clone()
        other[0, 12:] = (other[0, 12:] + 1) % 61
        gap = model(ids, selection="topk").logits - model(other, selection="topk").logits
        moved = max(moved, gap[:, :12].abs().max().item())
    assert moved > 1e-3


@given(config=configs(), seed=st.integers(0, 99))
def test_batch_rows_do_not_touch_each_other(config: MoRConfig, seed: int) -> None:
    model = build(config, seed)
    ids = _ids(seed, 3, 12)
    together = model(ids)
    for row in range(3):
        alone = model(ids[row : row + 1])
        torch.testing.assert_close(together.logits[row], alone.logits[0], rtol=1e-9, atol=1e-9)
        assert torch.equal(together.recursion_counts[row], alone.recursion_counts[0])
