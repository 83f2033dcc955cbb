"""What rounded weights cost, told by the engine's own log-probabilities."""

import pytest
import torch

from mor.engine.config import EngineConfig
from mor.eval.quantization_loss import quantization_loss
from mor.model.generation import generate
from mor.model.sampling import SamplingParams
from tiny import tiny_model


def test_the_same_weights_cost_nothing() -> None:
    model = tiny_model("expert")
    batches = [torch.randint(0, 61, (2, 20)), torch.randint(0, 61, (1, 20))]
    cost = quantization_loss(model, batches, EngineConfig())
    assert cost.tokens == 3 * 19
    assert cost.nll == pytest.approx(cost.nll_rounded)
    assert cost.changed_counts == 0
    params = SamplingParams(max_tokens=1, prompt_logprobs=True)
    prompts = [row for batch in batches for row in batch.tolist()]
    scores = [s for d in generate(model, prompts, params) for s in d.prompt_logprobs[1:]]
    assert cost.nll == pytest.approx(-sum(s for s in scores if s is not None) / len(scores))


def test_rounding_is_seen() -> None:
    model = tiny_model("expert")
    batch = torch.randint(0, 61, (4, 40))
    cost = quantization_loss(model, [batch], EngineConfig(dtype="bfloat16", kernels="reference"))
    assert cost.nll_rounded != cost.nll
    assert cost.nll_rounded == pytest.approx(cost.nll, abs=0.05)
    assert cost.as_dict()["nll_cost"] == pytest.approx(cost.nll_rounded - cost.nll)
