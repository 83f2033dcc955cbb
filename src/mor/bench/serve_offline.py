"""What HTTP costs: a server's streams against the same engine without a server, in turns.

The server runs in a process of its own, the engine in this one; each waits while the other works.
Both sides get the same prompts, new ones in every round, since both cache prefixes.
"""

import asyncio
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mor.bench.serve import (
    ArrivalProcess,
    BenchRequest,
    RequestResult,
    bodies,
    parse_response,
    send_all,
)
from mor.bench.timing import paired
from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.errors import ConfigError, RequestError
from mor.model.sampling import SamplingParams
from mor.serve.client import Client

MAX_COST = 0.08
"""Share of the offline tokens/s that HTTP may cost."""
MAX_WAIT = 1.3
"""Time to first token over the bare prefill."""

_SERVED = re.compile(r"is served at (http://\S+)")
_START_S = 600.0  # the first start on a machine compiles kernels
_STOP_S = 60.0
_WAITS_PER_ROUND = 4  # single requests are short: more of them for a steady median


@dataclass(frozen=True, kw_only=True)
class OverheadConfig:
    """What to compare."""

    model: Path
    streams: int = 32
    prompt: int = 128
    """Tokens of each prompt."""
    output: int = 128
    """Tokens generated for each."""
    rounds: int = 5
    seed: int = 0
    dtype: str | None = None
    quantization: str | None = None

    def __post_init__(self) -> None:
        for name in ("streams", "prompt", "output", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")

    def engine(self) -> LLM:
        """The engine, set up as the server's is."""
        values = {
            "max_num_seqs": self.streams,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }
        llm = LLM(self.model, EngineConfig.from_dict(values))
        maximum = llm.model_config.max_position_embeddings
        if self.prompt + self.output > maximum:
            raise ConfigError(
                f"{self.prompt} tokens of a prompt and {self.output} of output exceed the "
                f"model's {maximum} positions: ask for fewer."
            )
        return llm

    @property
    def options(self) -> list[str]:
        """The server's, so that its engine is the same."""
        given = {"--dtype": self.dtype, "--quantization": self.quantization}
        chosen = [part for name, value in given.items() if value for part in (name, value)]
        return ["--max-num-seqs", str(self.streams), *chosen]


@contextmanager
def serving(model: Path, options: list[str]) -> Generator[Client]:
    """`mor serve` in a process of its own, on a free port.

    Raises:
        RequestError: it does not start; says why.
    """
    command = [sys.executable, "-m", "mor", "serve", str(model), "--port", "0", *options]
    environment = {name: value for name, value in os.environ.items() if name != "MOR_API_KEY"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            yield Client.of(_address(process, log))
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: "subprocess.Popen[bytes]", log: Any) -> str:
    """Where it serves, once it does."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        done = process.poll() is not None
        log.seek(0)
        text = log.read()
        if found := _SERVED.search(text):
            return found[1]
        if done:
            break
        time.sleep(0.05)
    raise RequestError(f"the server does not start: {' '.join(text.split())[-400:]}")


class ServerAndOffline:
    """Both sides of the comparison; each call works through the next prompts of its side."""

    def __init__(self, plan: OverheadConfig, llm: LLM, client: Client, model: str) -> None:
        self._plan, self._llm, self._client, self._model = plan, llm, client, model
        self._draws = {side: random.Random(plan.seed) for side in ("http", "offline")}
        self.tokens: dict[str, list[list[list[int]]]] = {"http": [], "offline": []}
        self.waits: list[float] = []
        """Seconds to the first token of single requests."""

    def http(self, streams: int, output: int) -> None:
        """Streams over HTTP, all at once."""
        asks = [BenchRequest(prompt=p, max_tokens=output) for p in self._prompts("http", streams)]
        requests = bodies(asks, self._model, {"ignore_eos": True, "temperature": 0})
        outcomes, _ = asyncio.run(send_all(self._client, requests, ArrivalProcess()))
        answers: list[RequestResult] = [parse_response(outcome) for outcome in outcomes]
        self.waits.append(statistics.median(answer.ttft for answer in answers))
        self.tokens["http"].append([answer.token_ids for answer in answers])

    def offline(self, streams: int, output: int) -> None:
        """The same by the engine."""
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        done = self._llm.generate(self._prompts("offline", streams), params)
        self.tokens["offline"].append([completion.token_ids for completion in done])

    def _prompts(self, side: str, count: int) -> list[list[int]]:
        draw, size = self._draws[side], self._llm.model_config.vocab_size
        return [[draw.randrange(size) for _ in range(self._plan.prompt)] for _ in range(count)]

    @property
    def same(self) -> float:
        """Share of the texts that came out equal; fp32 sums of other batches may tip a token."""
        pairs = [
            pair
            for http, offline in zip(self.tokens["http"], self.tokens["offline"], strict=True)
            for pair in zip(http, offline, strict=True)
        ]
        return sum(a == b for a, b in pairs) / len(pairs)


def measure(plan: OverheadConfig, note: Callable[[str], None]) -> dict[str, Any]:
    """Tokens/s of concurrent streams, and the wait for the first token at an idle server.

    Raises:
        MorError: the model cannot be served so.
    """
    note("the server's start")
    with serving(plan.model, plan.options) as client:
        llm = plan.engine()
        card = asyncio.run(client.card())
        sides = ServerAndOffline(plan, llm, client, card["id"])
        note(f"{plan.streams} streams")
        load = paired(
            lambda: sides.http(plan.streams, plan.output),
            lambda: sides.offline(plan.streams, plan.output),
            rounds=plan.rounds,
        )
        note("single requests")
        sides.waits.clear()
        alone = paired(
            lambda: sides.http(1, 1), lambda: sides.offline(1, 1),
            rounds=_WAITS_PER_ROUND * plan.rounds,
        )  # fmt: skip
    tokens = plan.streams * plan.output
    waits = sides.waits[1:]  # the first was the warm-up
    ratios = [wait / prefill for wait, prefill in zip(waits, alone.b, strict=True)]
    return {
        "against": "offline",
        "model": str(plan.model),
        "streams": plan.streams,
        "prompt": plan.prompt,
        "output": plan.output,
        "http_tokens_per_s": tokens / statistics.median(load.a),
        "offline_tokens_per_s": tokens / statistics.median(load.b),
        "http_cost": 1 - 1 / load.ratio,
        "http_cost_bar": MAX_COST,
        "load": load.as_dict(),
        "ttft_ms": 1e3 * statistics.median(waits),
        "prefill_ms": 1e3 * statistics.median(alone.b),
        "ttft_ratio": statistics.median(ratios),
        "ttft_ratio_bar": MAX_WAIT,
        "ttft_ratio_min": min(ratios),
        "ttft_ratio_max": max(ratios),
        "same_texts": sides.same,
    }
