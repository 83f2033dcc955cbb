"""The engine adds to each token the LoRA pairs of its depth, whatever depths share its step."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine_helpers import check_empty, check_equals_oracle, prompts_with_shared_starts, run_all
from mor.engine.config import EngineConfig
from mor.engine.kernels.cpu_backend import CpuStack
from mor.engine.llm import LLM
from mor.model.generation import generate
from mor.model.sampling import SamplingParams
from mor.model.transformer import MoRModel
from tiny import tiny_model

KINDS = ("recursive", "recursive_shared", "sequence", "expert_shared", "expert_aux_router", "token")
WIDE = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
PROMPTS = prompts_with_shared_starts(11, 6, 24)
SETTINGS: dict[str, dict[str, Any]] = {
    "depth": {
        "block_size": 4,
        "max_num_seqs": 5,
        "max_num_batched_tokens": 20,
        "chunked_prefill_size": 7,
    },
    "sequence": {
        "block_size": 4,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 20,
        "batching": "sequence",
    },
}


def relaxed(kind: str, **fields: Any) -> MoRModel:
    """With deltas that matter: without them the tokens are others."""
    model = tiny_model(kind, relaxation_rank=6, **fields)
    bare = tiny_model(kind, **fields)
    bare.load_state_dict({n: v for n, v in model.state_dict().items() if "delta_" not in n})
    prompt = torch.tensor(PROMPTS[:1])
    assert (model(prompt).logits - bare(prompt).logits).abs().max() > 0.1
    return model


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_float64_equals_the_oracle(kind: str, setting: str) -> None:
    model = relaxed(kind)
    asked = [SamplingParams(max_tokens=8, prompt_logprobs=n % 2 == 0) for n in range(len(PROMPTS))]
    llm = LLM(model, EngineConfig(**SETTINGS[setting], kv_cache_memory_bytes=2**20))
    check_equals_oracle(llm, model, PROMPTS, asked)


@pytest.mark.parametrize("kind", ["recursive_shared", "sequence", "expert", "token_shared"])
def test_compiled_kernels_equal_the_forward_pass(kind: str) -> None:
    """In float32: log-probabilities of prompts, in chunks whose parts are at several depths."""
    model = relaxed(kind, **WIDE).float()
    config = EngineConfig(
        kernels="cpu", max_num_seqs=5, max_num_batched_tokens=20, chunked_prefill_size=7
    )
    asked = SamplingParams(max_tokens=6, prompt_logprobs=True)
    llm = LLM(model, replace(config, kv_cache_memory_bytes=2**22))
    for got, want in zip(
        run_all(llm, PROMPTS, [asked] * len(PROMPTS)), generate(model, PROMPTS, asked), strict=True
    ):
        assert (got.token_ids, got.recursion_counts) == (want.token_ids, want.recursion_counts)
        scores, wanted = got.prompt_logprobs[1:], want.prompt_logprobs[1:]
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(wanted), atol=1e-4, rtol=0)
    check_empty(llm)


@pytest.mark.parametrize("fields", [{"dtype": "bfloat16"}, {"quantization": "int8"}])
def test_smaller_weights_give_nearly_the_same(fields: dict[str, Any]) -> None:
    model = relaxed("recursive", **WIDE).float()
    asked = SamplingParams(max_tokens=1, prompt_logprobs=True)

    def scores(**more: Any) -> torch.Tensor:
        llm = LLM(model, EngineConfig(kernels="cpu", kv_cache_memory_bytes=2**22, **more))
        return torch.tensor(
            [s for c in llm.generate(PROMPTS, asked) for s in c.prompt_logprobs[1:]]
        )

    assert 0 < (scores(**fields) - scores()).abs().mean() < 0.05


def test_deltas_are_packed_in_float32() -> None:
    model = relaxed("expert", **WIDE).float()
    llm = LLM(model, EngineConfig(kernels="cpu", quantization="int8", kv_cache_memory_bytes=2**22))
    stack = llm.runner.block
    assert isinstance(stack, CpuStack)
    assert {w.weight_dtype for ws in stack.packed for w in ws} == {"int8"}
    pairs = [w for layer in stack.loras for deltas in layer for w in deltas.packed]
    assert len(pairs) == 2 * 5 * 3 * 2  # layers, products, depths, A and B
    assert {w.weight_dtype for w in pairs} == {"float32"}
