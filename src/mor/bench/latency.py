"""Prefill of one prompt at a time: MoR against vanilla, and against the ratio of their FLOPs."""

import random
import statistics
from collections.abc import Callable
from typing import Any

from mor.bench.throughput import ThroughputConfig
from mor.bench.timing import paired
from mor.bench.workload import engine, random_model
from mor.engine.llm import LLM
from mor.model.cost import depth_fractions_of, sequence_flops
from mor.model.sampling import SamplingParams


class Prefill:
    """An engine with one prompt at a time; each call computes a new one up to its first token."""

    def __init__(self, config: ThroughputConfig, recursions: int, tokens: int) -> None:
        model = random_model(config.model_config(recursions), min(512, tokens))
        self.llm: LLM = engine(
            model, 1, dtype=config.dtype, quantization=config.quantization, chunked_prefill_size=512
        )
        self.tokens = tokens
        self.counts: list[int] = []
        """Recursion counts of the latest prompt's tokens."""
        self._random = random.Random(0)

    def __call__(self) -> None:
        """Compute one random prompt and generate one token."""
        vocabulary = self.llm.model_config.vocab_size
        prompt = [self._random.randrange(vocabulary) for _ in range(self.tokens)]
        (completion,) = self.llm.generate([prompt], SamplingParams(max_tokens=1))
        self.counts = completion.prompt_recursion_counts


def prefill(config: ThroughputConfig, recursions: int, tokens: int) -> dict[str, Any]:
    """A MoR model's prefill of so many tokens against vanilla's, and the ratio of their FLOPs."""
    mor, vanilla = Prefill(config, recursions, tokens), Prefill(config, 1, tokens)
    times = paired(mor, vanilla, rounds=config.rounds)
    histogram = [mor.counts.count(r) for r in range(recursions + 1)]
    flops = []
    for one, depth_fractions in (
        (mor, depth_fractions_of(config.model_config(recursions), histogram)),
        (vanilla, None),
    ):
        each = sequence_flops(one.llm.model_config, tokens, depth_fractions=depth_fractions)
        flops.append((each.mean - each.head) * tokens + each.head)  # the head runs once
    ratio = flops[0] / flops[1]
    return {
        "tokens": tokens,
        "time": times.as_dict(),
        "flops_ratio": ratio,
        "time_over_flops": times.ratio / ratio,
        "tokens_per_s": [tokens / statistics.median(seconds) for seconds in (times.a, times.b)],
    }


def measure(config: ThroughputConfig, progress: Callable[[str], None]) -> dict[str, Any]:
    """Prefill of several lengths for each number of recursions."""
    lengths = [n for n in (128, 512, 2047) if n < config.model_config(1).max_position_embeddings]
    record: dict[str, Any] = {}
    for recursions in config.recursions:
        for tokens in lengths:
            progress(f"mor{recursions}: prefill of {tokens} tokens")
            record[f"mor{recursions}_prefill_{tokens}"] = prefill(config, recursions, tokens)
    return record
