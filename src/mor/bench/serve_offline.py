"""Measures what HTTP costs: a server's streams against the same engine without a server, in turns.

The server runs in a process of its own, the engine in this one; each waits while the other works.
Both get the same prompts, new ones in every round, since both cache prefixes.
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
    completion_bodies,
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
"""Share of the engine's tokens/s that HTTP may cost."""
MAX_WAIT = 1.3
"""Time to the first token over HTTP may be so many times the engine's."""

_SERVED = re.compile(r"is served at (http://\S+)")
_START_TIMEOUT_S = 600.0  # the first start on a machine compiles kernels
_STOP_TIMEOUT_S = 60.0
_SINGLES_PER_ROUND = 4  # single requests are short: more of them for a steady median


@dataclass(frozen=True, kw_only=True)
class OverheadConfig:
    """Settings of `mor bench serve --against offline`, under the names of its options.

    Raises:
        ConfigError: a value is out of its range.
    """

    model: Path
    """Folder of a checkpoint."""
    max_concurrency: int = 32
    """Streams at once; the engine's `max_num_seqs`."""
    random_input_len: int = 128
    """Tokens of each prompt."""
    random_output_len: int = 128
    """Tokens that are generated for each."""
    rounds: int = 5
    seed: int = 0
    dtype: str | None = None
    quantization: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_concurrency", "random_input_len", "random_output_len", "rounds"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"--{name.replace('_', '-')}={value} must be at least 1.")

    def engine(self) -> LLM:
        """An engine in this process with the settings of the server's.

        Raises:
            MorError: it cannot run the model, or the lengths exceed the model's positions.
        """
        values = {
            "max_num_seqs": self.max_concurrency,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }
        llm = LLM(self.model, EngineConfig.from_dict(values))
        maximum = llm.model_config.max_position_embeddings
        if self.random_input_len + self.random_output_len > maximum:
            raise ConfigError(
                f"--random-input-len={self.random_input_len} and --random-output-len="
                f"{self.random_output_len} exceed the model's {maximum} positions: ask for fewer."
            )
        return llm

    @property
    def server_options(self) -> list[str]:
        """Options of `mor serve` that give its engine the same settings."""
        given = {"--dtype": self.dtype, "--quantization": self.quantization}
        chosen = [part for name, value in given.items() if value for part in (name, value)]
        return ["--max-num-seqs", str(self.max_concurrency), *chosen]


@contextmanager
def serving(model: Path, options: list[str]) -> Generator[Client]:
    """Run `mor serve` in a process of its own on a free port; gives a client of it.

    Raises:
        RequestError: the server does not start; tells why.
    """
    command = [sys.executable, "-m", "mor", "serve", str(model), "--port", "0", *options]
    environment = {name: value for name, value in os.environ.items() if name != "MOR_API_KEY"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            yield Client.of(_wait_for_address(process, log))
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for_address(process: "subprocess.Popen[bytes]", log: Any) -> str:
    """The server's address, which its log tells once requests are accepted."""
    end = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < end:
        has_ended = process.poll() is not None  # asked before reading, so that no line is missed
        log.seek(0)
        text = log.read()
        if found := _SERVED.search(text):
            return found[1]
        if has_ended:
            break
        time.sleep(0.05)
    raise RequestError(f"the server does not start: {' '.join(text.split())[-400:]}")


class ServerAndOffline:
    """Generates the same random prompts with a server and with an engine in this process."""

    def __init__(self, config: OverheadConfig, llm: LLM, client: Client, model: str) -> None:
        self._config = config
        self._llm = llm
        self._client = client
        self._model = model
        # One generator each, so that both get the same prompts in whichever order they run.
        self._draws = {side: random.Random(config.seed) for side in ("http", "offline")}
        self.tokens: dict[str, list[list[list[int]]]] = {"http": [], "offline": []}
        """(calls, streams) token ids of every output."""
        self.ttfts: list[float] = []
        """For each call of `http` the median of its streams' seconds to the first token."""

    def http(self, streams: int, output: int) -> None:
        """Generate `output` tokens for each of the next prompts over HTTP, all at once."""
        prompts = self._prompts("http", streams)
        requests = [BenchRequest(prompt=prompt, max_tokens=output) for prompt in prompts]
        sent = completion_bodies(requests, self._model, {"ignore_eos": True, "temperature": 0})
        responses, _ = asyncio.run(send_all(self._client, sent, ArrivalProcess()))
        results: list[RequestResult] = [parse_response(response) for response in responses]
        self.ttfts.append(statistics.median(result.ttft for result in results))
        self.tokens["http"].append([result.token_ids for result in results])

    def offline(self, streams: int, output: int) -> None:
        """Generate the same with the engine in this process."""
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        completions = self._llm.generate(self._prompts("offline", streams), params)
        self.tokens["offline"].append([completion.token_ids for completion in completions])

    def _prompts(self, side: str, count: int) -> list[list[int]]:
        draw, size = self._draws[side], self._llm.model_config.vocab_size
        length = self._config.random_input_len
        return [[draw.randrange(size) for _ in range(length)] for _ in range(count)]

    @property
    def same_share(self) -> float:
        """Share of outputs that are equal. Not always 1: in fp32 other batches give other sums."""
        pairs = [
            pair
            for http, offline in zip(self.tokens["http"], self.tokens["offline"], strict=True)
            for pair in zip(http, offline, strict=True)
        ]
        return sum(a == b for a, b in pairs) / len(pairs)


def measure(config: OverheadConfig, note: Callable[[str], None]) -> dict[str, Any]:
    """Tokens/s of concurrent streams, and the time to the first token at an idle server.

    Args:
        note: is told what is being measured.

    Raises:
        MorError: the model cannot be served with these settings.
    """
    note("the server's start")
    with serving(config.model, config.server_options) as client:
        llm = config.engine()
        card = asyncio.run(client.card())
        both = ServerAndOffline(config, llm, client, card["id"])
        note(f"{config.max_concurrency} streams")
        load = paired(
            lambda: both.http(config.max_concurrency, config.random_output_len),
            lambda: both.offline(config.max_concurrency, config.random_output_len),
            rounds=config.rounds,
        )
        note("single requests")
        both.ttfts.clear()
        single = paired(
            lambda: both.http(1, 1),
            lambda: both.offline(1, 1),
            rounds=_SINGLES_PER_ROUND * config.rounds,
        )
    tokens = config.max_concurrency * config.random_output_len
    ttfts = both.ttfts[1:]  # the first was the warm-up round of `paired`
    ratios = [ttft / prefill for ttft, prefill in zip(ttfts, single.b, strict=True)]
    return {
        "against": "offline",
        "model": str(config.model),
        "streams": config.max_concurrency,
        "prompt": config.random_input_len,
        "output": config.random_output_len,
        "http_tokens_per_s": tokens / statistics.median(load.a),
        "offline_tokens_per_s": tokens / statistics.median(load.b),
        "http_cost": 1 - 1 / load.ratio,
        "http_cost_bar": MAX_COST,
        "load": load.as_dict(),
        "ttft_ms": 1e3 * statistics.median(ttfts),
        "prefill_ms": 1e3 * statistics.median(single.b),
        "ttft_ratio": statistics.median(ratios),
        "ttft_ratio_bar": MAX_WAIT,
        "ttft_ratio_min": min(ratios),
        "ttft_ratio_max": max(ratios),
        "same_texts": both.same_share,
    }
