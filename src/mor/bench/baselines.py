"""Our engine against transformers on the same weights, and int8 against float32 weights."""

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
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
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
    """A stopping criterion that stores the time after each token and never stops `generate`."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool)


def against_transformers(
    config: ThroughputConfig, sequences: int, tokens: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Greedy decode tokens/s of our vanilla engine over those of `generate` of transformers.

    Both have the same weights and the same random prompts. Theirs is timed from the first generated
    token on, ours from the first step after all prompts were computed.

    Args:
        tokens: that are generated for each sequence.
        progress: is told what is being measured.
    """
    progress(f"our engine against transformers, {sequences} sequences")
    model = random_model(config.model_config(1), 64)
    theirs = transformers_twin(model)
    draw = random.Random(0)
    vocab_size = model.config.vocab_size
    prompts = [[draw.randrange(vocab_size) for _ in range(config.prompt)] for _ in range(sequences)]
    rates: list[tuple[float, float]] = []
    same = 0.0
    for round_ in range(config.rounds + 1):
        if round_ % 2 == 0:  # in turns: neither always runs second
            our_rate, our_ids = _decode_ours(model, config, prompts, tokens)
            their_rate, their_ids = _decode_theirs(theirs, prompts, tokens)
        else:
            their_rate, their_ids = _decode_theirs(theirs, prompts, tokens)
            our_rate, our_ids = _decode_ours(model, config, prompts, tokens)
        if round_:  # the first one warms up
            rates.append((our_rate, their_rate))
        pairs = zip(our_ids, their_ids, strict=True)
        same = statistics.mean(a[:tokens] == b[:tokens] for a, b in pairs)
    ratios_by_round = [a / b for a, b in rates]
    return {
        "sequences": sequences,
        "tokens": tokens,
        "tokens_per_s": [statistics.median(column) for column in zip(*rates, strict=True)],
        "ratio": statistics.median(ratios_by_round),
        "ratio_min": min(ratios_by_round),
        "ratio_max": max(ratios_by_round),
        "same_output": same,
    }


def _decode_ours(
    model: MoRModel, config: ThroughputConfig, prompts: list[list[int]], tokens: int
) -> tuple[float, list[list[int]]]:
    """Our decode tokens/s, and the token ids of each output."""
    llm = engine(model, len(prompts), dtype=config.dtype, quantization=config.quantization)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    request_ids = [llm.add_request(prompt, params) for prompt in prompts]
    token_ids: dict[str, list[int]] = {}
    start: float | None = None  # when the first step without a prompt began
    num_timed = 0  # tokens since then
    while llm.has_unfinished_requests:
        prefilling = (
            any(s.num_unscheduled_tokens > 1 for s in llm.scheduler.running)
            or llm.scheduler.waiting
        )
        if not prefilling and start is None:
            start = time.perf_counter()
        outputs = llm.step()
        num_timed += len(outputs) if start is not None else 0
        for output in outputs:
            if output.completions:
                token_ids[output.request_id] = output.completions[0].token_ids
    assert start is not None, "a request has more than one token"
    rate = num_timed / (time.perf_counter() - start)
    return rate, [token_ids[request_id] for request_id in request_ids]


def _decode_theirs(
    theirs: Any, prompts: list[list[int]], tokens: int
) -> tuple[float, list[list[int]]]:
    """Decode tokens/s of transformers, and the token ids of each output."""
    token_times, ids = _TokenTimes(), torch.tensor(prompts)
    with torch.inference_mode():
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[token_times],
        )
    times = token_times.times
    return len(prompts) * (len(times) - 1) / (times[-1] - times[0]), out[:, ids.shape[1] :].tolist()


def quantized(config: ThroughputConfig, recursions: int, sequences: int) -> dict[str, Any]:
    """Decode tokens/s with int8 weights over those with fp32 weights, for one model."""
    from mor.bench.throughput import interleave, ratios

    model = random_model(config.model_config(recursions), 256)
    loads = [
        SteadyLoad(
            engine(model, sequences, quantization=kind), sequences, config.shape, staggered=False
        )
        for kind in ("int8", None)
    ]
    pairs = interleave(loads[0], loads[1], rounds=config.rounds, seconds=config.seconds)
    rates = [statistics.median(pair[i].tokens_per_s for pair in pairs) for i in (0, 1)]
    return {"tokens_per_s": rates, **ratios(pairs)}
