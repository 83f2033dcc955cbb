"""One request at a time: prefill of a prompt, and the time between tokens."""

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
    """An engine that gets one prompt after another; a call is one prompt up to its first token."""

    def __init__(self, plan: ThroughputConfig, recursions: int, tokens: int) -> None:
        model = random_model(plan.config(recursions), min(512, tokens))
        self.llm: LLM = engine(
            model, 1, dtype=plan.dtype, quantization=plan.quantization, chunked_prefill_size=512
        )
        self.tokens = tokens
        self.counts: list[int] = []
        """Recursion counts of the last prompt's tokens."""
        self._random = random.Random(0)

    def __call__(self) -> None:
        """One prompt, one token."""
        vocabulary = self.llm.model_config.vocab_size
        prompt = [self._random.randrange(vocabulary) for _ in range(self.tokens)]
        (done,) = self.llm.generate([prompt], SamplingParams(max_tokens=1))
        self.counts = done.prompt_recursion_counts


def prefill(plan: ThroughputConfig, recursions: int, tokens: int) -> dict[str, Any]:
    """A MoR model's prefill against vanilla's: seconds, and against the ratio of FLOPs."""
    mor, vanilla = Prefill(plan, recursions, tokens), Prefill(plan, 1, tokens)
    times = paired(mor, vanilla, rounds=plan.rounds)
    histogram = [mor.counts.count(r) for r in range(recursions + 1)]
    flops = []
    for one, depth_fractions in (
        (mor, depth_fractions_of(plan.config(recursions), histogram)),
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
        "tokens_per_s": [tokens / statistics.median(side) for side in (times.a, times.b)],
    }


def measure(plan: ThroughputConfig, progress: Callable[[str], None]) -> dict[str, Any]:
    """Prefill of several lengths for each number of recursions."""
    lengths = [n for n in (128, 512, 2047) if n < plan.config(1).max_position_embeddings]
    record: dict[str, Any] = {}
    for recursions in plan.recursions:
        for tokens in lengths:
            progress(f"mor{recursions}: prefill of {tokens} tokens")
            record[f"mor{recursions}_prefill_{tokens}"] = prefill(plan, recursions, tokens)
    return record
