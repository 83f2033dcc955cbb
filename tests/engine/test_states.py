"""States of tokens in flight: the compiled form against the plain one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.engine.request import Chunk
from mor.engine.states import ExpertChoiceStates, FusedExpertChoiceStates
from mor.model.router import ExpertChoiceRouter
from tiny import build, tiny_config

NUM = 6
WIDE = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16}


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "none"])
@pytest.mark.parametrize("gating", ["weighted", "additive"])
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.5, 1.0, 3.0]), st.booleans())
def test_one_call_does_what_the_plain_form_does(
    activation: str, gating: str, seed: int, temperature: float, first_full: bool
) -> None:
    config = tiny_config(
        "expert",
        **WIDE,
        router_activation=activation,
        gating=gating,
        router_temperature=temperature,
        router_alpha=0.7,
        capacities=(1.0 if first_full else 0.8, 0.6, 0.4),
        thresholds=(0.1, -0.2, 0.3),
    )
    model = build(config, seed).float()
    router = model.router
    assert isinstance(router, ExpertChoiceRouter)
    router.requires_grad_(False)
    made = [
        kind(config, torch.zeros(NUM + 2, config.hidden_size), router)
        for kind in (ExpertChoiceStates, FusedExpertChoiceStates)
    ]
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randperm(NUM + 2, generator=draw)[:NUM].tolist()
    llm = LLM(model, EngineConfig(kernels="reference", kv_cache_memory_bytes=2**20))
    llm.add_request([1] * NUM)
    chunk = Chunk(sequence=llm.scheduler.waiting[0], start=0, state_slots=rows)
    x = torch.randn(NUM, config.hidden_size, generator=draw)
    entered = [states.write([chunk], x.clone()) for states in made]
    assert entered[0] == entered[1]
    if first_full:
        assert all(entered[0])
    for _ in range(3):
        depths = torch.randint(
            1, 4, (NUM,), generator=draw
        ).tolist()  # 3: through, judged by nobody
        x = torch.randn(NUM, config.hidden_size, generator=draw)
        positions = torch.arange(NUM)
        goes_on = [states.update(rows, depths, positions, x.clone()) for states in made]
        assert goes_on[0] == goes_on[1]
        taken = [states.read(rows) for states in made]
        size = float(taken[0].abs().max())  # raw logits as gates let states grow
        assert torch.allclose(*taken, rtol=1e-4, atol=1e-5 * size)
        assert torch.equal(taken[1], made[1].read_exiting(rows))


@pytest.mark.parametrize(
    ("kind", "kernels", "fused"),
    [
        ("expert", "cpu", True),
        ("expert_shared", "cpu", True),
        ("expert", "reference", False),
        ("expert_aux_router", "cpu", False),
        ("expert_random", "cpu", False),
        ("expert_bare", "cpu", False),  # its routers are no single matrices
        ("token", "cpu", False),
    ],
)
def test_linear_routers_on_cpus_are_compiled(kind: str, kernels: str, fused: bool) -> None:
    model = build(tiny_config(kind, **WIDE)).float()
    llm = LLM(model, EngineConfig(kernels=kernels, kv_cache_memory_bytes=2**22))
    assert isinstance(llm.runner.states, FusedExpertChoiceStates) is fused
