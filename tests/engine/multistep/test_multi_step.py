"""Multi-step decoding: steps in a row on the device, and what the host makes of them."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine_helpers import (
    VOCAB,
    check_empty,
    check_equals_oracle,
    engine_of,
    prompts_with_shared_starts,
    shared_model,
)
from mor.engine.backend import _resolve_num_scheduler_steps
from mor.engine.config import EngineConfig
from mor.engine.kernels.torch_backend import TorchKernels
from mor.engine.kv_cache import KVCache
from mor.engine.llm import LLM
from mor.engine.model_runner import ModelRunner
from mor.engine.multistep.device_decoder import DeviceDecoder, _Bucket
from mor.engine.plan import DecodeOutput, DecodePlan
from mor.engine.sampler import DeviceSampler
from mor.errors import ConfigError
from mor.model.sampling import SamplingParams
from mor.model.transformer import MoRModel
from mor.ops import reference
from tiny import tiny_config, tiny_model

KINDS = (
    *("vanilla", "recursive", "sequence", "expert", "expert_shared", "expert_bare"),
    *("expert_aux_router", "expert_random", "token", "token_shared"),
)


@contextmanager
def watched(llm: LLM) -> Generator[list[tuple[int, int]]]:
    """(sequences, steps) of each multi-step run."""
    assert llm.multi_step is not None
    decoder, found = llm.multi_step._decoder, []
    run = decoder.run

    def noting(plan: DecodePlan) -> DecodeOutput:
        found.append((len(plan.chunks), plan.num_steps))
        return run(plan)

    decoder.run = noting  # type: ignore[method-assign]
    yield found
    decoder.run = run  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference_generator(kind: str) -> None:
    """Greedy and drawn tokens, those that end early, limits of recursions and of length."""
    number = KINDS.index(kind)  # the engine's state machine draws both at random
    num_scheduler_steps, block_size = (2, 3, 8, 5, 13)[number % 5], (1, 4, 16, 3)[number % 4]
    has_depths = kind not in ("vanilla", "sequence")
    asked: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "top_k": 5},
        {"temperature": 1.2, "top_p": 0.8, "stop_token_ids": [*range(20)]},
        {"max_recursions": 1} if has_depths else {"temperature": 0.7, "min_p": 0.1},
        {"logprobs": 0, "temperature": 0.5, "stop_token_ids": [*range(9)]},
        {"min_recursions": 2} if has_depths else {"ignore_eos": True},
    ]
    lengths = (9, 1, 13, 6, 11, 8)
    params = [
        SamplingParams(max_tokens=length, seed=length, **fields)
        for length, fields in zip(lengths, asked, strict=True)
    ]
    llm = engine_of(kind, num_scheduler_steps=num_scheduler_steps, block_size=block_size)
    with watched(llm) as runs:
        check_equals_oracle(
            llm, shared_model(kind), prompts_with_shared_starts(num_scheduler_steps, 6), params
        )
    assert max(steps for _, steps in runs) == num_scheduler_steps
    check_empty(llm)


def test_most_decode_steps_are_in_runs() -> None:
    llm = engine_of(num_scheduler_steps=8)
    with watched(llm) as runs:
        done = llm.generate([[1, 2, 3], [4, 5], [6]], SamplingParams(max_tokens=24))
    assert [len(one.token_ids) for one in done] == [24] * 3
    assert {size for size, _ in runs} <= {1, 2, 3}
    assert sum(steps for _, steps in runs) > 0.8 * llm.stats.steps
    passes = sum(c for one in done for c in (*one.prompt_recursion_counts, *one.recursion_counts))
    # the first token's count is among those of the prompt; what came after the end is not counted
    assert llm.stats.block_tokens == passes - sum(one.recursion_counts[0] for one in done)


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"repetition_penalty": 1.2}, "it looks back at the tokens"),
        ({"logprobs": 3}, "likely tokens are listed"),
        ({"min_tokens": 12}, "stop tokens are forbidden for a while"),
    ],
)
def test_what_needs_the_host_at_every_token(params: dict[str, Any], why: str) -> None:
    llm = engine_of(num_scheduler_steps=4)
    asked = [SamplingParams(max_tokens=12), SamplingParams(max_tokens=12, **params)]
    with watched(llm) as runs:
        check_equals_oracle(llm, shared_model("expert"), [[1, 2], [3, 4]], asked)
    assert all(size == 1 for size, _ in runs), why


def test_whoever_waits_is_let_in_before_the_next_run() -> None:
    llm = engine_of(num_scheduler_steps=4, max_num_seqs=2)
    with watched(llm) as runs:
        llm.add_request([1, 2], SamplingParams(max_tokens=40))
        while not runs:
            llm.step()
        llm.add_request([3, 4], SamplingParams(max_tokens=40))
        before = len(runs)
        llm.step()
        assert len(llm.scheduler.running) == 2
        assert len(runs) == before
        llm.add_request([5, 6], SamplingParams(max_tokens=4))  # for which there is no room
        while len(runs) < before + 2:
            llm.step()
        assert len(llm.scheduler.waiting) == 1
    while llm.has_unfinished_requests:
        llm.step()
        llm.check_integrity()
    check_empty(llm)


def test_with_short_memory_steps_go_one_by_one() -> None:
    model = shared_model("expert")
    page = LLM(model, EngineConfig(block_size=2, kv_cache_memory_bytes=2**20)).cache.page_bytes
    llm = engine_of(
        num_scheduler_steps=16,
        block_size=2,
        kv_cache_memory_bytes=40 * page,
        enable_prefix_caching=False,
    )
    asked = [SamplingParams(max_tokens=9)] * 4
    with watched(llm) as runs:
        check_equals_oracle(llm, model, [[n, n + 1, n + 2] for n in range(4)], asked)
    assert not [size for size, _ in runs if size == 4]
    check_empty(llm)


def test_a_stop_text_ends_a_sequence_in_the_middle_of_a_run() -> None:
    llm = engine_of(num_scheduler_steps=8, enable_prefix_caching=False)
    (whole,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=20))
    stop = whole.token_ids[9]
    first = whole.token_ids.index(stop)
    events = list(llm.stream([5, 6, 7], SamplingParams(max_tokens=20, stop_token_ids=(stop,))))
    assert [event.token_id for event in events] == whole.token_ids[: first + 1]
    assert events[-1].finish_reason == "stop"
    check_empty(llm)


def test_an_interrupted_run_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3)
    (want,) = engine_of().generate([[5, 6, 7]], params)
    llm = engine_of(num_scheduler_steps=8)
    llm.add_request([5, 6, 7], params)
    process_token, left = llm.output_processor.process_token, [11]

    def interrupted(*args: Any) -> bool:
        finished = process_token(*args)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return finished

    monkeypatch.setattr(llm.output_processor, "process_token", interrupted)
    tokens: list[int] = []
    completions = None
    while llm.has_unfinished_requests:
        try:
            events = llm.step()
        except KeyboardInterrupt:
            llm.check_integrity()
            continue
        tokens += [e.token_id for e in events]
        completions = events[-1].completions if events else completions
    assert left[0] < 0
    assert completions is not None
    assert completions[0].token_ids == want.token_ids
    assert completions[0].recursion_counts == want.recursion_counts
    assert tokens == want.token_ids  # also the one after which the interruption came
    check_empty(llm)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("expert", {"kernels": "cpu", "dtype": "float32"}, "kernels='cpu', which wait for nobody"),
        ("expert", {"batching": "sequence"}, "batching='sequence', which waits for the deepest"),
        ("expert_relaxed", {}, "relaxation_rank, whose tokens"),
    ],
)
def test_runs_that_cannot_be(kind: str, fields: dict[str, Any], words: str) -> None:
    wide = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    model = tiny_model(kind, **wide)
    with pytest.raises(
        ConfigError, match=f"num_scheduler_steps=2 does not go with {words}.*leave it out"
    ):
        LLM(model, EngineConfig(kv_cache_memory_bytes=2**20, num_scheduler_steps=2, **fields))
    assert (
        LLM(
            model, EngineConfig(kv_cache_memory_bytes=2**20, num_scheduler_steps=1, **fields)
        ).backend.num_scheduler_steps
        == 1
    )


@pytest.mark.parametrize(
    ("device", "kernels", "num_scheduler_steps"),
    [("cuda", "triton", 8), ("cuda", "reference", 1), ("cpu", "reference", 1)],
)
def test_the_default_is_several_steps_where_they_can_be_recorded(
    device: str, kernels: str, num_scheduler_steps: int
) -> None:
    found = _resolve_num_scheduler_steps(
        shared_model("expert"), EngineConfig(), torch.device(device), kernels
    )
    assert found == num_scheduler_steps


class OnTheDevice(TorchDispatchMode):
    """Forbids operations that take or give tensors on the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        assert all(x.is_meta for x in tensors), f"{func} meets the host"
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_stays_on_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the device `meta` have no values: nobody can look at one, as in a CUDA graph.

    The truth of attention and of storing does look; Triton's kernels are tested elsewhere.
    """
    monkeypatch.setattr(reference, "attend", lambda q, kv, layer, metadata: torch.zeros_like(q))
    monkeypatch.setattr(reference, "store", lambda *_: None)
    config, device = tiny_config(kind), torch.device("meta")
    with device:
        model = MoRModel(config).bfloat16()
    settings = EngineConfig(kv_cache_memory_bytes=2**20)
    cache = KVCache(config, settings, torch.bfloat16, device)
    kernels = TorchKernels(config, reference, cache.kv, torch.bfloat16)
    runner = ModelRunner(model, settings, cache, kernels, 16)
    draws = ({}, {"temperature": 0.9}, {"temperature": 0.8, "top_k": 5}, {"temperature": 1.2})
    params = [SamplingParams(**fields, top_p=0.9, min_p=0.1) for fields in draws]
    with torch.no_grad():  # inference_mode would hide parts of operations
        bucket = _Bucket(runner, len(params), config.num_recursions, 3, None)
        sampler = DeviceSampler(params, config.vocab_size, device)
        monkeypatch.delattr(torch, "tensor")  # which sends numbers from the host
        with OnTheDevice():
            assert bucket._step(sampler).shape == (len(params), 4)


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x[x > 1],
        lambda x: (x > 1).nonzero(),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: 1 if x.any() else 0,
        lambda x: x.repeat_interleave(x),
        lambda x: x + torch.tensor(1),
    ],
)
def test_the_guard_above_does_catch(look: Callable[[torch.Tensor], Any]) -> None:
    x = torch.arange(3, device="meta")
    with pytest.raises((AssertionError, RuntimeError)), OnTheDevice():
        look(x)


def test_a_sampler_for_many_steps_is_the_sampler() -> None:
    from mor.engine.plan import SamplingInput
    from mor.engine.sampler import sample

    draw = torch.Generator().manual_seed(0)
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=1.1, top_k=7),
        SamplingParams(temperature=0.9, top_p=0.6, min_p=0.05),
        SamplingParams(temperature=1.4, top_k=3, top_p=0.9),
    ]
    steady = DeviceSampler(params, VOCAB, torch.device("cpu"))
    for _ in range(20):
        logits = torch.randn(len(params), VOCAB, generator=draw) * 3
        uniforms = torch.rand(len(params), generator=draw, dtype=torch.float64)
        rows = [
            SamplingInput(params=p, uniform=float(u), prompt=(), output=(), forbidden=())
            for p, u in zip(params, uniforms, strict=True)
        ]
        want = sample(logits, rows)
        tokens, logprobs = steady(logits, uniforms)
        assert tokens.tolist() == list(want.token_ids)
        assert logprobs.tolist() == pytest.approx(want.logprobs)


def test_runs_keep_their_memory() -> None:
    llm = engine_of(num_scheduler_steps=2)
    assert llm.multi_step is not None
    llm.generate([[1], [2], [3]], SamplingParams(max_tokens=8))
    decoder = llm.multi_step._decoder
    assert isinstance(decoder, DeviceDecoder)
    kept = dict(decoder._buckets)
    llm.generate([[1], [2], [3]], SamplingParams(max_tokens=8))
    assert decoder._buckets == kept
