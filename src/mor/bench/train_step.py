"""Time and memory of training steps: MoR against vanilla, and against the ratio of their FLOPs.

All models take turns in one process: a round is one optimizer step of each. Peak memory is measured
in a fresh process for each model, twice: bytes of live tensors, and resident bytes.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mor.bench.timing import gemm_gflops, timed
from mor.bench.train_ab import Stepper, depth_fractions
from mor.errors import ConfigError
from mor.model.config import MoRConfig
from mor.model.cost import training_flops
from mor.model.ragged_batch import RaggedBatch
from mor.model.router import RecursionLimits, RoutingOutput, TokenChoiceRouter
from mor.train.config import ActivationCheckpointing, TrainConfig

TIME_BAR = 1.07
"""Bar of (time / vanilla's time) / (FLOPs / vanilla's FLOPs) of a step."""
GEMM_BAR = 0.6
"""Lower bar of the FLOP/s of vanilla's step over those of a large matrix product."""
MEMORY_BAR = 0.75
"""Bar of the peak memory of MoR with R = 2 over vanilla's."""
TOKEN_CHOICE_BAR = 1.15
"""Bar of a step's time with token choice over that with expert choice of the same mean depth."""


@dataclass(frozen=True, kw_only=True)
class TrainStepConfig:
    """Settings of `mor bench train`."""

    preset: str = "135m"
    """Sizes of all models."""
    models: tuple[str, ...] = ("mor2", "mor3", "mor4", "token3")
    """Names as `model_config` takes them; vanilla is always measured, too."""
    rounds: int = 5
    batch_size: int = 2
    """Sequences of a step."""
    length: int = 512
    """Tokens of each sequence."""
    compile: bool = False
    activation_checkpointing: ActivationCheckpointing = "none"

    def model_config(self, name: str) -> MoRConfig:
        """A model by its name: `vanilla`, `morR` (expert choice with R recursions) or `tokenR`.

        Raises:
            ConfigError: there is no model of that name.
        """
        kind = name.rstrip("0123456789")
        digits = name.removeprefix(kind)
        if name == "vanilla":
            fields: dict[str, Any] = {"num_recursions": 1, "routing": "none"}
        elif kind in ("mor", "token") and digits and int(digits) > 1:
            routing = "expert_choice" if kind == "mor" else "token_choice"
            fields = {"num_recursions": int(digits), "routing": routing}
        else:
            raise ConfigError(f"--models {name!r} is unknown: vanilla, mor2, mor3, token3, ..")
        return MoRConfig.preset(self.preset, max_position_embeddings=self.length, **fields)

    def stepper(self, name: str) -> Stepper:
        """The model of that name with its optimizer and a random batch."""
        settings = TrainConfig(
            sequence_length=self.length,
            batch_size=self.batch_size,
            compile=self.compile,
            activation_checkpointing=self.activation_checkpointing,
        )
        stepper = Stepper(self.model_config(name), self.batch_size, self.length, settings)
        if isinstance(stepper.model.router, TokenChoiceRouter):
            stepper.model.router = ForcedDepths(stepper.model.router)
        return stepper


class ForcedDepths(TokenChoiceRouter):
    """Token choice with random recursion counts in place of the router's, of known mean depth.

    The router computes its choice as always, so that its time is in the measurement. Every count
    from 1 to R gets the same share, which is the mean depth of expert choice with its default
    capacities. Which token gets which count is drawn anew in each step, so that sequences have
    different numbers of tokens at a depth.
    """

    def __init__(self, router: TokenChoiceRouter) -> None:
        super().__init__(router.config)
        self.load_state_dict(router.state_dict())

    def choose(
        self,
        x: Tensor,
        ragged: RaggedBatch,
        record: RoutingOutput | None,
        limits: RecursionLimits | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The (N,) random recursion counts, and the router's (N, 1) weights."""
        _, weight = super().choose(x, ragged, record, limits)
        num = x.shape[0]
        # 1, 2, .., R, 1, 2, ..: the shares are exact, before they are shuffled.
        counts = torch.arange(num, device=x.device) % self.config.num_recursions + 1
        return counts[torch.randperm(num, device=x.device)], weight


def measure(config: TrainStepConfig) -> dict[str, Any]:
    """Times, FLOPs and peak memory of all models as a JSON object."""
    # Token choice is compared with expert choice of as many recursions: it is measured, too.
    peers = [f"mor{n[5:]}" for n in config.models if n.startswith("token")]
    names = tuple(dict.fromkeys(("vanilla", *peers, *config.models)))
    models = {name: config.model_config(name) for name in names}
    memory = {name: peak_bytes(config, name) for name in names}
    resident = {name: peak_bytes(config, name, resident=True) for name in names}
    steppers = {name: config.stepper(name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: list[float] = []
    for round_ in range(config.rounds + 1):  # the first one warms up, and is left out below
        peaks.append(gemm_gflops())
        for name in names if round_ % 2 else reversed(names):
            seconds[name].append(timed(steppers[name].step))
    times = {name: values[1:] for name, values in seconds.items()}
    tokens = config.batch_size * config.length
    flops = {
        name: tokens * training_flops(model, config.length, depth_fractions(model, config.length))
        for name, model in models.items()
    }
    rate = flops["vanilla"] / statistics.median(times["vanilla"]) / 1e9
    return {
        "batch": [config.batch_size, config.length],
        "compile": config.compile,
        "step_s": {name: statistics.median(values) for name, values in times.items()},
        "peak_bytes": memory,
        "resident_bytes": resident,
        "models": {
            n: _against_vanilla(n, times, flops, memory)
            | {"resident_ratio": resident[n] / resident["vanilla"]}
            for n in names
            if n.startswith("mor")
        },
        "vanilla_gflops": rate,
        "gemm_peak_gflops": max(peaks),
        "gemm_share": rate / max(peaks),
        "gemm_ok": rate / max(peaks) >= GEMM_BAR,
        "token_choice": {
            name: _ratios(times[name], times[peer], TOKEN_CHOICE_BAR)
            for name, peer in ((n, f"mor{n[5:]}") for n in names if n.startswith("token"))
        },
    }


def _ratios(ours: list[float], theirs: list[float], bar: float) -> dict[str, Any]:
    """Our seconds over theirs: all rounds, their median, and whether it meets the bar."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    return {"ratio": ratio, "ratios": ratios, "bar": bar, "ok": ratio <= bar}


def _against_vanilla(
    name: str, times: dict[str, list[float]], flops: dict[str, float], memory: dict[str, int]
) -> dict[str, Any]:
    """Time, FLOPs and memory of a MoR model, each over vanilla's."""
    flops_ratio = flops[name] / flops["vanilla"]
    found = _ratios(times[name], times["vanilla"], TIME_BAR * flops_ratio)
    found |= {"flops_ratio": flops_ratio, "time_over_flops": found["ratio"] / flops_ratio}
    found["memory_ratio"] = memory[name] / memory["vanilla"]
    if name == "mor2":
        found |= {"memory_bar": MEMORY_BAR, "memory_ok": found["memory_ratio"] <= MEMORY_BAR}
    return found


def peak_bytes(
    config: TrainStepConfig, name: str, *, resident: bool = False, steps: int = 2
) -> int:
    """Peak memory of a process of its own that trains one model for some steps.

    Args:
        resident: on a CPU, resident bytes as malloc is set for training, with what it keeps for
            later; otherwise malloc returns what is freed, so that live bytes are left.
    """
    fields = dataclasses.asdict(config)
    script = (
        "import sys, json; import torch; from mor.bench.train_step import TrainStepConfig;"
        " from mor.train.throughput import peak_memory;"
        " from mor.ops.malloc import return_freed_memory;"
        " fields, name, steps, threads, resident = json.loads(sys.argv[1]);"
        " torch.set_num_threads(threads); stepper = TrainStepConfig(**fields).stepper(name);"
        " resident or return_freed_memory();"
        " [stepper.step() for _ in range(steps)]; print(peak_memory(stepper.batch.device))"
    )
    arguments = json.dumps([fields, name, steps, torch.get_num_threads(), resident])
    command = [sys.executable, "-c", script, arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return int(done.stdout.split()[-1])


def tables(record: dict[str, Any]) -> Any:
    """Header and rows of each table that `mor bench train` prints."""
    models = record["models"].items()
    header = ("", "time ratio", "FLOP ratio", "time / FLOPs", "bar", "memory", "bar", "resident")
    rows = [
        (
            name,
            f"{m['ratio']:.3f}",
            f"{m['flops_ratio']:.3f}",
            f"{m['time_over_flops']:.3f}",
            f"{TIME_BAR:.2f}",
            f"{m['memory_ratio']:.3f}",
            f"{m['memory_bar']:.2f}" if "memory_bar" in m else "",
            f"{m['resident_ratio']:.3f}",
        )
        for name, m in models
    ]
    share = (
        "vanilla",
        f"{record['vanilla_gflops']:.0f}",
        f"{record['gemm_peak_gflops']:.0f}",
        f"{record['gemm_share']:.1%}",
        f"{GEMM_BAR:.0%}",
    )
    token = [
        (name, f"mor{name[5:]}", f"{t['ratio']:.3f}", f"{t['bar']:.2f}")
        for name, t in record["token_choice"].items()
    ]
    return [
        (header, rows),
        (("", "GFLOP/s", "large products", "share", "bar"), [share]),
        *([(("", "against", "time ratio", "bar"), token)] if token else []),
    ]
