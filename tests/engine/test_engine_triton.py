"""The engine on the Triton kernels: interpreted here, compiled and as CUDA graphs on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.model.generation import generate
from mor.model.sampling import SamplingParams
from tiny import build as build_model
from tiny import tiny_config

pytest.importorskip("triton", reason="needs the extra `gpu`")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="runs the tests below itself")
@pytest.mark.slow
@pytest.mark.parametrize("kinds", ["short", "long"])
def test_in_the_interpreter(kinds: str) -> None:
    """A process of its own: Triton reads the variable once, when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", kinds, str(HERE)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU")
@pytest.mark.parametrize(
    ("kind", "lengths", "max_tokens", "chunk", "num_scheduler_steps"),
    [
        *(
            pytest.param(
                kind, (2, 7, 1), 3, 3, num_scheduler_steps, id=f"short-{kind}-{num_scheduler_steps}"
            )
            for kind, num_scheduler_steps in (
                ("expert", 1),
                ("expert_shared", 1),
                ("expert_qk_norm", 1),
                ("expert", 4),
            )
        ),
        *(
            pytest.param(
                kind, (3, 19, 1), 5, 7, num_scheduler_steps, id=f"long-{kind}-{num_scheduler_steps}"
            )
            for kind in ("vanilla", "expert", "expert_shared", "token", "expert_relaxed")
            for num_scheduler_steps in ((1,) if kind == "expert_relaxed" else (1, 5))
        ),
    ],
)
def test_equals_the_reference_generator(
    kind: str, lengths: tuple[int, ...], max_tokens: int, chunk: int, num_scheduler_steps: int
) -> None:
    """Decode steps go through `CUDAGraphLayerStack` or `DeviceDecoder`: captured on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(tiny_config(kind, **SHAPE)).float().to(device)
    torch.manual_seed(0)
    prompts = [torch.randint(0, 61, (n,)).tolist() for n in lengths]
    params = SamplingParams(max_tokens=max_tokens)
    wanted = generate(model, prompts, params)
    config = EngineConfig(
        kernels="triton",
        device=device,
        chunked_prefill_size=chunk,
        num_scheduler_steps=num_scheduler_steps,
    )
    llm = LLM(model, config)
    for want, got in zip(wanted, llm.generate(prompts, params), strict=True):
        assert got.token_ids == want.token_ids
        assert got.recursion_counts == want.recursion_counts
        assert got.prompt_recursion_counts == want.prompt_recursion_counts
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)
