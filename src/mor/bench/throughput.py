"""Tokens per second of MoR with depth-wise batching, against vanilla and against the FLOP bound.

Every comparison runs two engines in one process, step by step in turns, and takes the median of the
rounds' ratios. The bound is what the saved FLOPs allow at best: FLOPs of a vanilla request over
those of a MoR request, by the cost model, at the measured depth histogram.
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
from mor.engine.kernels.cpu_backend import CpuKernels, CpuStack
from mor.engine.llm import LLM
from mor.errors import ConfigError
from mor.model.config import MoRConfig
from mor.model.cost import decode_flops, depth_fractions_of, kv_bytes_per_token

VANILLA = "vanilla"


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """Settings of `mor bench throughput` and `mor bench latency`.

    `max_num_seqs`, `dtype`, `quantization` and `num_scheduler_steps` are fields of `EngineConfig`,
    and mean there and here the same.
    """

    preset: str = "135m"
    """Sizes of all models that are measured."""
    models: tuple[str, ...] = ("mor2", "mor3", "mor4")
    """Models that are compared with vanilla: `mor` and the number of recursions."""
    max_num_seqs: int = 64
    """Sequences in flight, all the time."""
    prompt: int = 128
    """Tokens of each prompt."""
    output: int = 128
    """Tokens that are generated for each."""
    decode_only: bool = False
    """Compute all prompts before the clock starts, and start no further requests."""
    rounds: int = 5
    """Measured rounds of each comparison."""
    seconds: float = 6.0
    """That each of the two engines gets in a round."""
    dtype: str | None = None
    quantization: str | None = None
    num_scheduler_steps: int | None = None

    def __post_init__(self) -> None:
        for name in self.models:
            digits = name.removeprefix("mor")
            if not digits.isdigit() or int(digits) < 2:
                raise ConfigError(f"--models {name!r} is unknown: mor2, mor3, mor4, ..")

    @property
    def recursions(self) -> tuple[int, ...]:
        """Recursions of `models`, in their order."""
        return tuple(int(name.removeprefix("mor")) for name in self.models)

    @property
    def shape(self) -> RequestShape:
        """The size of the requests."""
        return RequestShape(prompt=self.prompt, output=self.output)

    def model_config(self, recursions: int) -> MoRConfig:
        """The model with so many recursions; 1 is vanilla.

        The head is not tied to the embedding: an untrained tied model repeats its last token for
        ever, and its routers then see one token instead of many.
        """
        mor = MoRConfig.preset(
            self.preset, num_recursions=max(2, recursions), tie_word_embeddings=False
        )
        return mor if recursions > 1 else mor.vanilla_twin()

    def load(
        self, recursions: int, max_num_seqs: int | None = None, **engine_options: Any
    ) -> SteadyLoad:
        """An engine with its requests in flight.

        Args:
            max_num_seqs: instead of the field.
            engine_options: further fields of `EngineConfig`; they replace ours.

        Raises:
            ConfigError: prompt and output exceed the model's positions.
        """
        count = self.max_num_seqs if max_num_seqs is None else max_num_seqs
        config = self.model_config(recursions)
        if self.prompt + self.output > config.max_position_embeddings:
            raise ConfigError(
                f"--prompt {self.prompt} and --output {self.output} exceed the model's "
                f"{config.max_position_embeddings} positions."
            )
        model = random_model(config, min(512, self.prompt + self.output))
        options = {
            "dtype": self.dtype,
            "quantization": self.quantization,
            "num_scheduler_steps": self.num_scheduler_steps,
        }
        llm = engine(model, count, **(options | engine_options))
        return SteadyLoad(llm, count, self.shape, staggered=not self.decode_only)


def interleave(
    a: SteadyLoad, b: SteadyLoad, *, rounds: int, seconds: float
) -> list[tuple[Measurement, Measurement]]:
    """Measurements of two engines in each of the rounds, in which each gets so many seconds.

    Within a round the engine that had less time so far takes the next step, so that whatever slows
    the machine down for a while slows both. A first round warms up and is left out.
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
    """The ratio of a's tokens per second to b's: median and range over the rounds.

    `ratio_of_sums` takes all rounds together; it varies less on a machine whose speed changes from
    step to step.
    """
    values = [a.tokens_per_s / b.tokens_per_s for a, b in pairs]
    mine, theirs = (sum(side, Measurement()) for side in zip(*pairs, strict=True))
    return {
        "ratio": statistics.median(values),
        "ratio_of_sums": mine.tokens_per_s / theirs.tokens_per_s,
        "ratio_min": min(values),
        "ratio_max": max(values),
        "rounds": len(values),
    }


def measure(config: ThroughputConfig, progress: Callable[[str], None]) -> dict[str, Any]:
    """Each MoR model against vanilla, and against itself with `batching="sequence"`.

    Args:
        progress: is told what is being measured.
    """
    vanilla = config.load(1)
    record: dict[str, Any] = {
        name: {}
        for name in (
            *("tokens_per_s", "ratio", "bound", "fraction_of_bound", "depth_histogram"),
            *("gemm_share", "overhead_share", "depth_over_sequence", "details"),
        )
    }
    rates: list[float] = []
    for recursions in config.recursions:
        name = f"mor{recursions}"
        progress(f"{name} against vanilla")
        depth = config.load(recursions)
        pairs = interleave(depth, vanilla, rounds=config.rounds, seconds=config.seconds)
        rates += [b.tokens_per_s for _, b in pairs]
        histogram = depth.llm.stats.depth_histogram
        result = ratios(pairs)
        bound = flops_bound(config, recursions, histogram)
        record["tokens_per_s"][name] = statistics.median(a.tokens_per_s for a, _ in pairs)
        record["ratio"][name] = result["ratio"]
        record["bound"][name] = bound
        record["fraction_of_bound"][name] = result["ratio"] / bound
        total = sum(histogram)
        record["depth_histogram"][name] = [count / total for count in histogram]
        record["gemm_share"][name] = gemm_share(depth, config.max_num_seqs)
        record["overhead_share"][name] = overhead(depth.llm)
        record["gemm_share"][VANILLA] = gemm_share(vanilla, config.max_num_seqs)
        record["overhead_share"][VANILLA] = overhead(vanilla.llm)
        record["details"][name] = {"against_vanilla": result}
        if not config.decode_only:
            progress(f"{name}: depth-wise against sequence-wise batching")
            whole = config.load(recursions, batching="sequence", num_scheduler_steps=None)
            # Sequence-wise batching has no multi-step runs; without them on both sides, only the
            # batching differs.
            if depth.llm.backend.num_scheduler_steps > 1:
                depth = config.load(recursions, num_scheduler_steps=1)
            pairs = interleave(depth, whole, rounds=config.rounds, seconds=config.seconds)
            result = ratios(pairs)
            record["depth_over_sequence"][name] = result["ratio"]
            record["details"][name]["against_sequence"] = result
    record["tokens_per_s"][VANILLA] = statistics.median(rates)
    return record


def equal_memory(config: ThroughputConfig, recursions: int) -> dict[str, Any]:
    """Decode with as many MoR sequences as fit into the memory of `max_num_seqs` vanilla ones."""
    models = config.model_config(1), config.model_config(recursions)
    bytes_each = [kv_bytes_per_token(model) for model in models]
    sequences = int(config.max_num_seqs * bytes_each[0] / bytes_each[1])
    vanilla, mor = config.load(1), config.load(recursions, sequences)
    pairs = interleave(mor, vanilla, rounds=config.rounds, seconds=config.seconds)
    used = [kv_bytes_in_use(load.llm) for load in (mor, vanilla)]
    return {
        "sequences": [sequences, config.max_num_seqs],
        "kv_bytes_in_use": used,
        **ratios(pairs),
    }


def flops_bound(config: ThroughputConfig, recursions: int, histogram: list[int]) -> float:
    """FLOPs of a vanilla request over those of a MoR request with this depth histogram."""
    shape = config.shape
    if config.decode_only:  # the prompts were computed before
        context = config.prompt + config.output // 2  # tokens before a generated one, on average
        mor = config.model_config(recursions)
        fractions = depth_fractions_of(mor, histogram)
        mine = decode_flops(mor, context, depth_fractions=fractions).mean
        return decode_flops(config.model_config(1), context).mean / mine
    vanilla = request_flops(config.model_config(1), shape)
    return vanilla / request_flops(config.model_config(recursions), shape, histogram)


def overhead(llm: LLM) -> float:
    """Share of the engine's time outside layers, head, routers and sampler: scheduling, Python."""
    return 1 - llm.stats.compute_seconds / llm.stats.seconds


def kv_bytes_in_use(llm: LLM) -> int:
    """Bytes of the KV pages that are not free."""
    return (llm.pool.num_pages - llm.pool.num_free) * llm.cache.page_bytes


def gemm_share(load: SteadyLoad, rows: int) -> float | None:
    """FLOP/s of the block's matrix products over their best FLOP/s alone, with so many rows.

    None where the engine does not count them: on other kernels than the CPU's.
    """
    stack, kernels, rate = load.llm.runner.block, load.llm.runner.kernels, load.product_rate()
    if rate is None or not isinstance(stack, CpuStack) or not isinstance(kernels, CpuKernels):
        return None
    return rate / best_product_rate(kernels, stack, rows)


def best_product_rate(kernels: CpuKernels, stack: CpuStack, rows: int, repeats: int = 9) -> float:
    """FLOP/s of a stack's matrix products alone, one after another: the best of several runs.

    Args:
        rows: tokens of the batch.
    """
    memory = kernels.workspace(rows)
    x = np.zeros((rows, memory.normed.shape[1]), np.float32)
    arrays = (  # inputs and outputs of each product of a layer
        (memory.normed[:rows], memory.q),
        (memory.normed[:rows], memory.kv),
        (memory.attn_out[:rows], x),
        (memory.normed[:rows], memory.gate_up),
        (memory.inner[:rows], x),
    )
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        for weights in stack.packed:
            for weight, (source, target) in zip(weights, arrays, strict=True):
                kernels.linear(weight, source, target)
        best = min(best, time.perf_counter() - began)
    flops = sum(2 * rows * w.in_features * w.out_features for ws in stack.packed for w in ws)
    return flops / best
