"""Other engines on the same weights, measured beside ours in one process."""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from mor.bench.throughput import ThroughputConfig
from mor.bench.workload import SteadyLoad, engine, random_model
from mor.errors import MissingExtraError
from mor.model.config import MoRConfig
from mor.model.sampling import SamplingParams
from mor.model.transformer import MoRModel


def transformers_twin(model: MoRModel) -> Any:
    """A vanilla model's weights as a `LlamaForCausalLM`.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    config: MoRConfig = model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps")
    names += ("tie_word_embeddings",)
    values = {name: getattr(config, name) for name in names}
    theirs = LlamaForCausalLM(
        LlamaConfig(
            **values,
            num_hidden_layers=config.num_block_layers,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    ).eval()
    renamed = {"block.": "model.layers.", "embed_tokens": "model.embed_tokens"}
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        for old, new in renamed.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        state["model.norm.weight" if name == "norm.weight" else name] = value
    theirs.load_state_dict(state, strict=True)
    return theirs


class _TokenTimes:
    """Notes the time after each token that `generate` makes; never stops it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool)


def against_transformers(
    plan: ThroughputConfig, sequences: int, tokens: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Decode tokens/s of our vanilla engine over those of `transformers` `generate`, greedy.

    Both have the same prompts and weights. Theirs counts from the first generated token on; ours
    from the tick after all prompts have entered.
    """
    progress(f"our engine against transformers, {sequences} sequences")
    model = random_model(plan.config(1), 64)
    theirs = transformers_twin(model)
    draw = random.Random(0)
    vocabulary = model.config.vocab_size
    prompts = [[draw.randrange(vocabulary) for _ in range(plan.prompt)] for _ in range(sequences)]
    rates: list[tuple[float, float]] = []
    same = 0.0
    for number in range(plan.rounds + 1):
        sides: dict[str, tuple[float, list[list[int]]]] = {}
        for side in ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours"):
            run = _ours if side == "ours" else _theirs
            subject: Any = (model, plan) if side == "ours" else theirs
            sides[side] = run(subject, prompts, tokens)
        if number:
            rates.append((sides["ours"][0], sides["theirs"][0]))
        pairs = zip(sides["ours"][1], sides["theirs"][1], strict=True)
        same = statistics.mean(a[:tokens] == b[:tokens] for a, b in pairs)
    values = [a / b for a, b in rates]
    return {
        "sequences": sequences,
        "tokens": tokens,
        "tokens_per_s": [statistics.median(side) for side in zip(*rates, strict=True)],
        "ratio": statistics.median(values),
        "ratio_min": min(values),
        "ratio_max": max(values),
        "same_output": same,
    }


def _ours(
    subject: tuple[MoRModel, ThroughputConfig], prompts: list[list[int]], tokens: int
) -> tuple[float, list[list[int]]]:
    model, plan = subject
    llm = engine(model, len(prompts), dtype=plan.dtype, quantization=plan.quantization)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    names = [llm.add_request(prompt, params) for prompt in prompts]
    output: dict[str, list[int]] = {}
    times: list[float] = []
    counted = 0
    while llm.has_unfinished_requests:
        prefilling = (
            any(s.num_unscheduled_tokens > 1 for s in llm.scheduler.running)
            or llm.scheduler.waiting
        )
        if not prefilling and not times:
            times.append(time.perf_counter())
        events = llm.step()
        counted += len(events) if times else 0
        for event in events:
            if event.completions:
                output[event.request_id] = event.completions[0].token_ids
    times.append(time.perf_counter())
    return counted / (times[-1] - times[0]), [output[name] for name in names]


def _theirs(theirs: Any, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
    stamps, ids = _TokenTimes(), torch.tensor(prompts)
    with torch.inference_mode():
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[stamps],
        )
    elapsed = stamps.times[-1] - stamps.times[0]
    return len(prompts) * (len(stamps.times) - 1) / elapsed, out[:, ids.shape[1] :].tolist()


def quantized(plan: ThroughputConfig, recursions: int, sequences: int) -> dict[str, Any]:
    """Decode tokens/s with int8 weights over those with fp32 weights."""
    from mor.bench.throughput import interleave, ratios

    model = random_model(plan.config(recursions), 256)
    loads = [
        SteadyLoad(
            engine(model, sequences, quantization=kind), sequences, plan.shape, staggered=False
        )
        for kind in ("int8", None)
    ]
    pairs = interleave(loads[0], loads[1], rounds=plan.rounds, seconds=plan.seconds)
    sides = [[pair[i].tokens_per_s for pair in pairs] for i in (0, 1)]
    return {"tokens_per_s": [statistics.median(side) for side in sides], **ratios(pairs)}
