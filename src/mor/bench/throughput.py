"""Tokens per second, depth-wise batched MoR against vanilla, and against the FLOP bound.

Every comparison runs two live engines in one process, tick by tick in turns, and takes the median
of the rounds' ratios. The bound is what the saved FLOPs allow at best: FLOPs of a vanilla request
over those of a MoR request, by the cost model, at the measured depth histogram.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mor.bench.workload import (
    Measurement,
    RequestShape,
    SteadyLoad,
    engine,
    random_model,
    request_flops,
)
from mor.engine.layer_stack import CpuKernels, CpuStack
from mor.engine.llm import LLM
from mor.errors import ConfigError
from mor.model.config import MoRConfig
from mor.model.cost import decode_flops, depth_fractions_of, kv_bytes_per_token

VANILLA = "vanilla"


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """What to measure."""

    preset: str = "135m"
    recursions: tuple[int, ...] = (2, 3, 4)
    sequences: int = 64
    prompt: int = 128
    output: int = 128
    decode_only: bool = False
    """Let all prompts enter before the clock starts, and start no new ones."""
    rounds: int = 5
    seconds: float = 6.0
    """Of each engine in a round."""
    dtype: str | None = None
    quantization: str | None = None
    num_scheduler_steps: int | None = None
    """Decode ticks in a row, see `EngineConfig`."""

    @property
    def shape(self) -> RequestShape:
        """Of the requests."""
        return RequestShape(prompt=self.prompt, output=self.output)

    def config(self, recursions: int) -> MoRConfig:
        """The model of so many recursions; 1 is vanilla.

        The head is not tied to the embedding: an untrained tied model repeats its last token for
        ever, and its routers then see one token instead of many.
        """
        mor = MoRConfig.preset(
            self.preset, num_recursions=max(2, recursions), tie_word_embeddings=False
        )
        return mor if recursions > 1 else mor.vanilla_twin()

    def load(self, recursions: int, sequences: int | None = None, **settings: Any) -> SteadyLoad:
        """A running engine."""
        count = self.sequences if sequences is None else sequences
        config = self.config(recursions)
        if self.prompt + self.output > config.max_position_embeddings:
            raise ConfigError(
                f"--prompt {self.prompt} and --output {self.output} exceed the model's "
                f"{config.max_position_embeddings} positions."
            )
        model = random_model(config, min(512, self.prompt + self.output))
        chosen = {
            "dtype": self.dtype,
            "quantization": self.quantization,
            "num_scheduler_steps": self.num_scheduler_steps,
        }
        chosen |= settings
        llm = engine(model, count, **chosen)
        return SteadyLoad(llm, count, self.shape, staggered=not self.decode_only)


def interleave(
    a: SteadyLoad, b: SteadyLoad, *, rounds: int, seconds: float
) -> list[tuple[Measurement, Measurement]]:
    """Rounds of two engines, so many seconds for each; a first one does not count.

    Within a round whoever had less time so far takes the next tick: what slows the machine down for
    a while meets both.
    """
    pairs: list[tuple[Measurement, Measurement]] = []
    for number in range(rounds + 1):
        if number == 1:
            a.reset()
            b.reset()
        mine, theirs = Measurement(), Measurement()
        while min(mine.seconds, theirs.seconds) < seconds:
            if mine.seconds <= theirs.seconds:
                mine += a.run(0)
            else:
                theirs += b.run(0)
        pairs.append((mine, theirs))
    return pairs[1:]


def ratios(pairs: Sequence[tuple[Measurement, Measurement]]) -> dict[str, Any]:
    """Median and spread of a's tokens per second over b's; and all rounds as one, which a machine
    that changes its speed by the tick blurs less."""
    values = [a.tokens_per_s / b.tokens_per_s for a, b in pairs]
    mine, theirs = (sum(side, Measurement()) for side in zip(*pairs, strict=True))
    return {
        "ratio": statistics.median(values),
        "ratio_of_sums": mine.tokens_per_s / theirs.tokens_per_s,
        "ratio_min": min(values),
        "ratio_max": max(values),
        "rounds": len(values),
    }


def measure(plan: ThroughputConfig, progress: Callable[[str], None]) -> dict[str, Any]:
    """Each MoR model against vanilla, and against itself with `batching="sequence"`."""
    vanilla = plan.load(1)
    record: dict[str, Any] = {
        name: {}
        for name in (
            *("tokens_per_s", "ratio", "bound", "fraction_of_bound", "depth_histogram"),
            *("gemm_share", "overhead_share", "depth_over_sequence", "details"),
        )
    }
    rates: list[float] = []
    for recursions in plan.recursions:
        name = f"mor{recursions}"
        progress(f"{name} against vanilla")
        depth = plan.load(recursions)
        pairs = interleave(depth, vanilla, rounds=plan.rounds, seconds=plan.seconds)
        rates += [window.tokens_per_s for _, window in pairs]
        histogram = depth.llm.stats.depth_histogram
        result = ratios(pairs)
        bound = flops_bound(plan, recursions, histogram)
        record["tokens_per_s"][name] = statistics.median(a.tokens_per_s for a, _ in pairs)
        record["ratio"][name] = result["ratio"]
        record["bound"][name] = bound
        record["fraction_of_bound"][name] = result["ratio"] / bound
        total = sum(histogram)
        record["depth_histogram"][name] = [count / total for count in histogram]
        record["gemm_share"][name] = gemm_share(depth, plan.sequences)
        record["overhead_share"][name] = overhead(depth.llm)
        record["gemm_share"][VANILLA] = gemm_share(vanilla, plan.sequences)
        record["overhead_share"][VANILLA] = overhead(vanilla.llm)
        record["details"][name] = {"against_vanilla": result}
        if not plan.decode_only:
            progress(f"{name}: depth-wise against sequence-wise batching")
            whole = plan.load(recursions, batching="sequence", num_scheduler_steps=None)
            if depth.llm.backend.num_scheduler_steps > 1:  # like with like: it has no bursts
                depth = plan.load(recursions, num_scheduler_steps=1)
            pairs = interleave(depth, whole, rounds=plan.rounds, seconds=plan.seconds)
            result = ratios(pairs)
            record["depth_over_sequence"][name] = result["ratio"]
            record["details"][name]["against_sequence"] = result
    record["tokens_per_s"][VANILLA] = statistics.median(rates)
    return record


def equal_memory(plan: ThroughputConfig, recursions: int) -> dict[str, Any]:
    """Decode with as many MoR sequences as fit into the memory of `plan.sequences` vanilla ones."""
    configs = plan.config(1), plan.config(recursions)
    bytes_each = [kv_bytes_per_token(config) for config in configs]
    sequences = int(plan.sequences * bytes_each[0] / bytes_each[1])
    vanilla, mor = plan.load(1), plan.load(recursions, sequences)
    pairs = interleave(mor, vanilla, rounds=plan.rounds, seconds=plan.seconds)
    used = [kv_bytes_in_use(load.llm) for load in (mor, vanilla)]
    return {
        "sequences": [sequences, plan.sequences],
        "kv_bytes_in_use": used,
        **ratios(pairs),
    }


def flops_bound(plan: ThroughputConfig, recursions: int, histogram: list[int]) -> float:
    """FLOPs of vanilla over those of the model at this histogram."""
    shape = plan.shape
    if plan.decode_only:  # the prompts entered before
        context = plan.prompt + plan.output // 2
        config = plan.config(recursions)
        mine = decode_flops(
            config, context, depth_fractions=depth_fractions_of(config, histogram)
        ).mean
        return decode_flops(plan.config(1), context).mean / mine
    vanilla = request_flops(plan.config(1), shape)
    return vanilla / request_flops(plan.config(recursions), shape, histogram)


def overhead(llm: LLM) -> float:
    """Share of a tick in scheduling and Python: outside layers, head, routers and sampler."""
    return 1 - llm.stats.compute_seconds / llm.stats.seconds


def kv_bytes_in_use(llm: LLM) -> int:
    """Bytes of the pages that are held."""
    return (llm.pool.num_pages - llm.pool.num_free) * llm.cache.page_bytes


def gemm_share(load: SteadyLoad, rows: int) -> float | None:
    """The rate of the block's products as a share of their best alone, packed, at so many rows."""
    stack, kernels, rate = load.llm.runner.block, load.llm.runner.kernels, load.product_rate()
    if rate is None or not isinstance(stack, CpuStack) or not isinstance(kernels, CpuKernels):
        return None
    return rate / best_product_rate(kernels, stack, rows)


def best_product_rate(kernels: CpuKernels, stack: CpuStack, rows: int, repeats: int = 9) -> float:
    """FLOP/s of a stack's matrix products alone, one after another: the best of several runs."""
    y, q, kv, mixed, gate_up, inner, *_ = kernels.workspace(rows)
    x = np.zeros((rows, y.shape[1]), np.float32)
    arrays = ((y, q), (y, kv), (mixed, x), (y, gate_up), (inner, x))
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        for weights in stack.packed:
            for weight, (source, target) in zip(weights, arrays, strict=True):
                kernels.linear(weight, source, rows, target)
        best = min(best, time.perf_counter() - began)
    flops = sum(2 * rows * w.in_features * w.out_features for ws in stack.packed for w in ws)
    return flops / best
