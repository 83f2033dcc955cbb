"""Routers: who goes on, with which weight, and what they learn from it."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mor.errors import ConfigError
from mor.model.ragged_batch import RaggedBatch
from mor.model.router import (
    ExpertChoiceRouter,
    RandomRouter,
    RoutingOutput,
    TokenChoiceRouter,
    capacity_at_step,
)
from mor.model.transformer import MoRModel
from tiny import tiny_config, tiny_model

CPU = torch.device("cpu")


def ids(batch: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (batch, time), generator=torch.Generator().manual_seed(seed))


def reading_first_feature(router: torch.nn.Module) -> None:
    """Make a linear router's logit i the state's feature i."""
    with torch.no_grad():
        weight = router.proj.weight.zero_()
        for i in range(len(weight)):
            weight[i, i] = 1.0


def states(*columns: list[float]) -> Tensor:
    """(N, E) states whose first features are these columns."""
    x = torch.zeros(len(columns[0]), 24, dtype=torch.float64)
    for i, column in enumerate(columns):
        x[:, i] = torch.tensor(column, dtype=torch.float64)
    return x


# Capacity


@given(capacity=st.floats(0.01, 1), warmup=st.integers(1, 1000))
def test_capacity_falls_from_one_to_its_value(capacity: float, warmup: int) -> None:
    course = [capacity_at_step(capacity, step, warmup) for step in range(2 * warmup + 1)]
    assert course[0] == 1
    assert course[warmup:] == pytest.approx([capacity] * (warmup + 1))
    assert all(a >= b for a, b in pairwise(course))
    assert course == [capacity_at_step(capacity, step, warmup) for step in range(2 * warmup + 1)]
    half = capacity_at_step(capacity, warmup, 2 * warmup)
    assert half == pytest.approx((1 + capacity) / 2)


def test_without_warmup_capacity_is_constant() -> None:
    assert [capacity_at_step(0.3, step, 0) for step in (0, 1, 99)] == [0.3] * 3


@pytest.mark.parametrize("time", [1, 2, 3, 7, 10, 33])
def test_topk_selects_the_capacity_of_the_whole_sequence(time: int) -> None:
    model = tiny_model("expert_bare")
    out = model(ids(3, time), selection="topk")
    fractions = (0.8, 0.7, 0.3, 0.2)
    assert [s.shape for s in out.selected] == [(3, max(1, int(c * time))) for c in fractions]
    deeper = list(pairwise(out.selected))
    for row in range(3):
        assert all(set(b[row].tolist()) <= set(a[row].tolist()) for a, b in deeper)
    totals = torch.zeros(3, time, dtype=torch.long)
    for selected in out.selected:
        assert (selected.diff(dim=1) > 0).all()
        totals.scatter_add_(1, selected, torch.ones_like(selected))
    assert torch.equal(out.recursion_counts, totals)


def test_topk_takes_the_largest_gates() -> None:
    router = ExpertChoiceRouter(tiny_config("expert")).double()
    reading_first_feature(router.routers[1])
    record = RoutingOutput()
    x = states([0.3, -2.0, 5.0, 1.0, 0.9, 4.0])
    choice = router.choose(1, x, RaggedBatch.full(2, 3, CPU), 2, record)
    assert choice.ragged.positions.tolist() == [0, 2, 0, 2]
    assert choice.indices is not None
    assert choice.indices.tolist() == [0, 2, 3, 5]
    torch.testing.assert_close(choice.gate[:, 0], 0.1 * x[:, 0].sigmoid()[[0, 2, 3, 5]])
    assert record.selected[0].tolist() == [[0, 2], [0, 2]]
    bce = torch.nn.functional.softplus(x[:, 0]).mean() - (0.3 + 5.0 + 1.0 + 4.0) / 6
    torch.testing.assert_close(record.losses["sampling_loss"], bce.double())
    # By z >= 0 tokens 0, 2, 3, 4, 5 go on; by top-k all of these but 4.
    assert record.correct[0].item() == pytest.approx(5 / 6)


def test_forward_takes_other_capacities() -> None:
    model = tiny_model("expert").train()
    out = model(ids(2, 20), capacities=(1.0, 0.9, 0.05))
    assert [s.shape[1] for s in out.selected] == [20, 18, 1]
    whole = model(ids(2, 20), capacities=(1.0, 1.0, 1.0))
    assert (whole.recursion_counts == 3).all()
    assert [s.shape[1] for s in model(ids(2, 21)).selected] == [21, 14, 7]
    # A depth cannot take more than the depth before it left.
    assert [s.shape[1] for s in model(ids(2, 20), capacities=(0.5, 1, 1)).selected] == [10] * 3


# Thresholds


def test_a_logit_at_the_threshold_goes_on() -> None:
    config = tiny_config("expert", capacities=(0.9, 0.5, 0.2), thresholds=(0.5, 0.0, -1.25))
    router = ExpertChoiceRouter(config).double()
    for depth, tau in enumerate((0.5, 0.0, -1.25)):
        reading_first_feature(router.routers[depth])
        logits = [tau, math.nextafter(tau, -2), math.nextafter(tau, 2), tau - 1, tau + 1]
        record = RoutingOutput()
        x = states(logits)
        choice = router.choose(depth, x, RaggedBatch.full(1, 5, CPU), None, record)
        assert choice.ragged.positions.tolist() == [0, 2, 4]
        assert torch.equal(record.decisions[0], x[:, 0])
        assert record.selected == []
        assert record.losses == {}


@pytest.mark.parametrize(("first", "free"), [(1.0, True), (0.99, False)])
def test_depth_0_is_free_exactly_if_its_capacity_is_one(first: float, free: bool) -> None:
    model = tiny_model("expert", capacities=(first, 0.5, 0.2), thresholds=(1e9, 1e9, 1e9))
    out = model(ids(2, 9), selection="threshold")
    assert (out.recursion_counts == int(free)).all()
    assert torch.isfinite(out.logits).all()


def test_evaluation_uses_thresholds_and_training_topk() -> None:
    model = tiny_model("expert", thresholds=(0.0, -1e9, -1e9))
    assert (model.eval()(ids(1, 12)).recursion_counts == 3).all()
    assert (model.eval()(ids(1, 12), selection="topk").recursion_counts == 3).sum() == 4
    assert (model.train()(ids(1, 12)).recursion_counts == 3).sum() == 4


def test_set_thresholds_changes_the_model_and_its_config() -> None:
    model = tiny_model("expert")
    model.set_thresholds((0.0, 1e9, 1e9))
    assert model.config.thresholds == (0.0, 1e9, 1e9)
    assert (model(ids(1, 12)).recursion_counts == 1).all()
    model.set_thresholds((0.0, -1e9, 1e9))
    assert (model(ids(1, 12)).recursion_counts == 2).all()


@pytest.mark.parametrize("kind", ["vanilla", "recursive", "token"])
def test_models_without_thresholds_say_so(kind: str) -> None:
    model = tiny_model(kind)
    words = f"need routing='expert_choice'; this model has routing='{model.config.routing}'"
    with pytest.raises(ConfigError, match=words):
        model.set_thresholds((0.0,) * 3)


def test_wrong_thresholds_leave_the_model_alone() -> None:
    model = tiny_model("expert")
    before = model.config
    for table in ((0.0, 0.0), (0.0, math.nan, 0.0)):
        with pytest.raises(ConfigError, match="thresholds"):
            model.set_thresholds(table)
    assert model.config is before


# Gates


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("sigmoid", lambda z: 0.3 / (1 + math.exp(-z))),
        ("tanh", lambda z: 0.3 * math.tanh(z)),
        ("none", lambda z: z),
    ],
)
def test_gate_functions(activation: str, expected: object) -> None:
    router = ExpertChoiceRouter(
        tiny_config("expert", router_activation=activation, router_alpha=0.3)
    )
    logits = [-3.0, -0.5, 0.0, 0.25, 4.0]
    gates = router.gate(torch.tensor(logits, dtype=torch.float64)).tolist()
    assert gates == pytest.approx([expected(z) for z in logits], abs=1e-12)


def test_temperature_divides_the_state() -> None:
    for model in (tiny_model("expert", router_temperature=4.0), tiny_model("expert")):
        reading_first_feature(model.router.routers[0])
        main, _ = model.router.logits(0, states([2.0, 8.0]), RaggedBatch.full(1, 2, CPU))
        assert (main * model.config.router_temperature).tolist() == [2.0, 8.0]


# The second router


def gradients(model: MoRModel, loss: Tensor) -> set[str]:
    """Names of the parameters that a loss moves."""
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    moved = zip(named, grads, strict=True)
    return {name for name, grad in moved if grad is not None and grad.abs().sum() > 0}


def test_the_second_router_learns_alone() -> None:
    model = tiny_model("expert_aux_router").train()
    out = model(ids(2, 12), labels=ids(2, 12))
    moved = gradients(model, out.aux_losses["sampling_loss"])
    assert moved == {f"router.aux_routers.{r}.proj.weight" for r in range(2)}
    out = model(ids(2, 12), labels=ids(2, 12))
    by_loss = gradients(model, out.loss)
    assert not any("aux_routers" in name for name in by_loss)
    assert {"router.routers.0.proj.weight", "router.routers.1.proj.weight"} <= by_loss


def test_the_auxiliary_loss_reaches_router_and_backbone() -> None:
    model = tiny_model("expert").train()
    out = model(ids(2, 12), labels=ids(2, 12))
    moved = gradients(model, out.aux_losses["sampling_loss"])
    assert {"router.routers.2.proj.weight", "embed_tokens.weight"} <= moved
    assert "block.0.mlp.up_proj.weight" in moved
    assert "coda.0.mlp.up_proj.weight" not in moved


def test_the_second_router_decides_and_the_first_weighs() -> None:
    router = ExpertChoiceRouter(tiny_config("expert_aux_router", capacities=(0.9, 0.5))).double()
    reading_first_feature(router.routers[0])
    with torch.no_grad():
        router.aux_routers[0].proj.weight.zero_()[0, 1] = 1.0
    x = states([5.0, -5.0, 1.0, -1.0], [-1.0, 1.0, -2.0, 2.0])
    ragged, record = RaggedBatch.full(1, 4, CPU), RoutingOutput()
    causal = router.choose(0, x, ragged, None, record)
    assert causal.ragged.positions.tolist() == [1, 3]
    torch.testing.assert_close(causal.gate[:, 0], 0.1 * x[:, 0].sigmoid()[[1, 3]])
    assert torch.equal(record.decisions[0], x[:, 1])
    best = router.choose(0, x, ragged, 2, record)
    assert best.ragged.positions.tolist() == [0, 2]


# The random router


def test_a_random_router_is_a_fixed_function_of_position_in_evaluation() -> None:
    positions = torch.arange(4000)
    logits = {}
    for depth in range(3):
        router = RandomRouter(tiny_config("expert_random"), 1, depth).eval()
        logits[depth] = router(torch.zeros(4000, 24), positions)[:, 0]
        assert torch.equal(logits[depth], router(torch.ones(4000, 24), positions)[:, 0])
        some = torch.tensor([7, 3999, 0])
        assert torch.equal(router(torch.zeros(3, 24), some)[:, 0], logits[depth][some])
        ordered = logits[depth].sigmoid().sort().values
        uniform = (torch.arange(4000) + 0.5) / 4000
        assert (ordered - uniform).abs().max() < 0.03
    together = torch.stack([logits[r].sigmoid() for r in range(3)])
    assert (together.corrcoef() - torch.eye(3)).abs().max() < 0.05


def test_a_random_router_draws_anew_in_training() -> None:
    router = RandomRouter(tiny_config("token"), 3).train()
    x, positions = torch.zeros(500, 24), torch.arange(500)
    torch.manual_seed(0)
    first, second = router(x, positions), router(x, positions)
    assert first.shape == (500, 3)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(router(x, positions), first)
    assert list(router.parameters()) == []


# Token choice


def test_the_bias_moves_the_choice_and_never_the_weight() -> None:
    model = tiny_model("token_loss_free", router_activation="softmax", num_recursions=3)
    router = model.router
    reading_first_feature(router.router)
    x = states([2.0, 0.0, 0.1], [0.0, 1.5, 0.0], [0.0, 0.0, 0.2])
    ragged = RaggedBatch.full(1, 3, CPU)
    probs = x[:, :3].softmax(-1)
    router.bias.zero_()
    counts, weight = router.choose(x, ragged, RoutingOutput())
    assert counts.tolist() == [1, 2, 3]
    torch.testing.assert_close(weight[:, 0], probs.max(-1).values)
    router.bias.copy_(torch.tensor([0.0, 0.2, 0.0]))
    counts, weight = router.choose(x, ragged, RoutingOutput())
    assert counts.tolist() == [1, 2, 2]
    torch.testing.assert_close(weight[:, 0], probs[[0, 1, 2], [0, 1, 1]])


def test_the_bias_moves_towards_depths_with_too_few_tokens() -> None:
    router = TokenChoiceRouter(tiny_config("token_loss_free", balancing_update_rate=0.25))
    router.update_bias(torch.tensor([0.5, 0.25, 0.05, 0.2]))
    assert router.bias.tolist() == [-0.25, 0.0, 0.25, 0.25]
    router.update_bias(torch.tensor([0.25, 0.25, 0.25, 0.25]))
    assert router.bias.tolist() == [-0.25, 0.0, 0.25, 0.25]
    assert "bias" in dict(router.named_buffers())
    assert "bias" in router.state_dict()


def test_fractions_count_every_depth() -> None:
    router = TokenChoiceRouter(tiny_config("token"))
    assert router.fractions(torch.tensor([1, 3, 3, 1, 1])).tolist() == pytest.approx([0.6, 0, 0.4])
    assert router.fractions(torch.tensor([], dtype=torch.long)).tolist() == [0, 0, 0]


def test_balancing_loss_is_least_when_balanced() -> None:
    router = TokenChoiceRouter(tiny_config("token")).double()
    reading_first_feature(router.router)

    def loss(*columns: list[float]) -> float:
        record = RoutingOutput()
        router.choose(states(*columns), RaggedBatch.full(1, 3, CPU), record)
        return record.losses["balancing_loss"].item()

    even = loss([9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0])
    lumped = loss([9.0, 9.0, 9.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    assert even == pytest.approx(1.0, abs=1e-3)  # sum of P_i * F_i with P = 1/3, F = 1
    assert lumped == pytest.approx(3.0, abs=1e-2)
