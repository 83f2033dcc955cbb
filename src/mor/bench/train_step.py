"""Training steps of MoR against vanilla: do dropped tokens save the time and memory they should?

All models take turns in one process: a round is one optimizer step of each. Peak memory is that of
a fresh process per model: what is alive in it, and beside it what is resident.
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
"""Most that a step's time may be, as a multiple of its FLOPs; both against vanilla's."""
GEMM_BAR = 0.6
"""Least share of the machine's rate in large products that vanilla's step must reach."""
MEMORY_BAR = 0.75
"""Most peak memory of MoR with R = 2 against vanilla's."""
TOKEN_CHOICE_BAR = 1.15
"""Most that a step of token choice may take against expert choice of the same mean depth."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What `mor bench train` measures."""

    preset: str = "135m"
    models: tuple[str, ...] = ("mor2", "mor3", "mor4", "token3")
    rounds: int = 5
    batch_size: int = 2
    length: int = 512
    compile: bool = False
    activation_checkpointing: ActivationCheckpointing = "none"

    def config(self, name: str) -> MoRConfig:
        """`vanilla`, `morR` (expert choice) or `tokenR` (token choice with R recursions).

        Raises:
            ConfigError: another name.
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
        """The model with its optimizer and a batch."""
        settings = TrainConfig(
            sequence_length=self.length,
            batch_size=self.batch_size,
            compile=self.compile,
            activation_checkpointing=self.activation_checkpointing,
        )
        stepper = Stepper(self.config(name), self.batch_size, self.length, settings)
        if isinstance(stepper.model.router, TokenChoiceRouter):
            stepper.model.router = ForcedDepths(stepper.model.router)
        return stepper


class ForcedDepths(TokenChoiceRouter):
    """Token choice at work, whose decisions are replaced by ragged ones of known mean depth.

    Every count from 1 to R has the same share, which is expert choice's mean depth with its usual
    capacities; which token takes which is drawn anew each time, so sequences differ in length.
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
        """(N,) counts and (N, 1) weights; see `TokenChoiceRouter.choose`."""
        _, weight = super().choose(x, ragged, record, limits)
        num = x.shape[0]
        counts = torch.arange(num, device=x.device) % self.config.num_recursions + 1
        return counts[torch.randperm(num, device=x.device)], weight


def measure(plan: StepPlan) -> dict[str, Any]:
    """Times, FLOPs and peak memory of all models; plain data."""
    peers = [f"mor{n[5:]}" for n in plan.models if n.startswith("token")]
    names = tuple(dict.fromkeys(("vanilla", *peers, *plan.models)))
    configs = {name: plan.config(name) for name in names}
    memory = {name: peak_bytes(plan, name) for name in names}
    resident = {name: peak_bytes(plan, name, resident=True) for name in names}
    steppers = {name: plan.stepper(name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: list[float] = []
    for round_ in range(plan.rounds + 1):  # the first does not count
        peaks.append(gemm_gflops())
        for name in names if round_ % 2 else reversed(names):
            seconds[name].append(timed(steppers[name].step))
    times = {name: values[1:] for name, values in seconds.items()}
    tokens = plan.batch_size * plan.length
    flops = {
        name: tokens * training_flops(config, plan.length, depth_fractions(config, plan.length))
        for name, config in configs.items()
    }
    rate = flops["vanilla"] / statistics.median(times["vanilla"]) / 1e9
    return {
        "batch": [plan.batch_size, plan.length],
        "compile": plan.compile,
        "step_s": {name: statistics.median(values) for name, values in times.items()},
        "peak_bytes": memory,
        "resident_bytes": resident,
        "models": {
            n: _against_vanilla(n, times, flops, memory)
            | {"resident_ratio": resident[n] / resident["vanilla"]}
            for n in names
            if n[0] == "m"
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
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    return {"ratio": ratio, "ratios": ratios, "bar": bar, "ok": ratio <= bar}


def _against_vanilla(
    name: str, times: dict[str, list[float]], flops: dict[str, float], memory: dict[str, int]
) -> dict[str, Any]:
    flops_ratio = flops[name] / flops["vanilla"]
    found = _ratios(times[name], times["vanilla"], TIME_BAR * flops_ratio)
    found |= {"flops_ratio": flops_ratio, "time_over_flops": found["ratio"] / flops_ratio}
    found["memory_ratio"] = memory[name] / memory["vanilla"]
    if name == "mor2":
        found |= {"memory_bar": MEMORY_BAR, "memory_ok": found["memory_ratio"] <= MEMORY_BAR}
    return found


def peak_bytes(plan: StepPlan, name: str, *, resident: bool = False, steps: int = 2) -> int:
    """Most memory that a process holds that trains nothing but this model.

    Args:
        resident: as it trains, which on a CPU includes what malloc keeps for later or cannot use
            again; otherwise what is alive, as a GPU's allocator would count it.
    """
    fields = dataclasses.asdict(plan)
    script = (
        "import sys, json; import torch; from mor.bench.train_step import StepPlan;"
        " from mor.train.throughput import peak_memory;"
        " from mor.ops.malloc import return_freed_memory;"
        " plan, name, steps, threads, resident = json.loads(sys.argv[1]);"
        " torch.set_num_threads(threads); stepper = StepPlan(**plan).stepper(name);"
        " resident or return_freed_memory();"
        " [stepper.step() for _ in range(steps)]; print(peak_memory(stepper.batch.device))"
    )
    asked = json.dumps([fields, name, steps, torch.get_num_threads(), resident])
    command = [sys.executable, "-c", script, asked]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return int(done.stdout.split()[-1])


def tables(record: dict[str, Any]) -> Any:
    """Header and rows of each table that people read."""
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
