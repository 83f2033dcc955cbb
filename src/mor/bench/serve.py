"""A load on an OpenAI-compatible server: how long its tokens take, and how many come.

Names and meanings are those of vLLM's `vllm bench serve`. While requests run, an event's bytes and
its time are kept and nothing else is done; they are read when all are over.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mor.errors import ConfigError, DataError, MorError, RequestError
from mor.serve.client import Client, read_event

METRICS = ("ttft", "tpot", "itl", "e2el")
"""Time to first token, time per output token after it, inter-token latency, end to end."""


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """One request: a prompt as text or token ids, and the tokens wanted."""

    prompt: str | list[int]
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class ArrivalProcess:
    """When requests are sent."""

    request_rate: float = math.inf
    """Requests per second; infinite sends all at once."""
    burstiness: float = 1.0
    """1 is a Poisson process, less comes in bursts, more comes evenly."""
    max_concurrency: int | None = None
    """Requests under way at most; later ones wait on this side, which is not counted."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.request_rate > 0:
            raise ConfigError(f"--request-rate={self.request_rate} must be above 0, or inf.")
        if not 0 < self.burstiness < math.inf:
            raise ConfigError(f"--burstiness={self.burstiness} must be above 0; 1 is Poisson.")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"--max-concurrency={self.max_concurrency} must be at least 1.")

    def delays(self, count: int) -> list[float]:
        """Seconds from the start to each request."""
        if math.isinf(self.request_rate):
            return [0.0] * count
        draw, at = random.Random(self.seed), 0.0
        times: list[float] = []
        for _ in range(count):
            times.append(at)
            at += draw.gammavariate(self.burstiness, 1 / (self.request_rate * self.burstiness))
        return times


@dataclass(kw_only=True)
class RawResponse:
    """What came of a request, as it came."""

    started: float = 0.0
    times: list[float] = field(default_factory=list)
    events: list[bytes] = field(default_factory=list)
    error: str = ""


@dataclass(kw_only=True)
class RequestResult:
    """A request's outcome, read. Times are in seconds."""

    ttft: float
    e2el: float
    itl: list[float]
    prompt_tokens: int
    output_tokens: int
    token_ids: list[int]
    """Empty where the server does not tell them."""
    recursions: list[int]

    @property
    def tpot(self) -> float | None:
        """None where there is no second token."""
        if self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)


def random_requests(
    count: int, *, input_len: int, output_len: int, vocab_size: int, spread: float, seed: int
) -> list[BenchRequest]:
    """Prompts of random token ids, lengths even within `1 - spread` to `1 + spread` of those given.

    Raises:
        ConfigError: a value is out of its range.
    """
    if not 0 <= spread < 1:
        raise ConfigError(f"--random-range-ratio={spread} must be in [0, 1).")
    if min(count, input_len, output_len) < 1:
        raise ConfigError("--num-prompts, --random-input-len and --random-output-len start at 1.")
    draw = random.Random(seed)

    def length(mean: int) -> int:
        return draw.randint(max(1, round(mean * (1 - spread))), round(mean * (1 + spread)))

    return [
        BenchRequest(
            prompt=[draw.randrange(vocab_size) for _ in range(length(input_len))],
            max_tokens=length(output_len),
        )
        for _ in range(count)
    ]


def file_requests(path: Path, count: int, *, output_len: int, seed: int) -> list[BenchRequest]:
    """Prompts of a file of JSON lines with the keys `prompt` and, if wanted, `output_tokens`.

    They come in a random order, again and again if the file has fewer than `count`.

    Raises:
        DataError: the file cannot be read, or a line is not as it should be.
        ConfigError: a value is out of its range.
    """
    if min(count, output_len) < 1:
        raise ConfigError("--num-prompts and --custom-output-len start at 1.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the prompts cannot be read ({error}).") from error
    asks = [
        _read_request(path, n, line, output_len) for n, line in enumerate(lines, 1) if line.strip()
    ]
    if not asks:
        raise DataError(f"{path}: there is no prompt in it.")
    random.Random(seed).shuffle(asks)
    return [asks[number % len(asks)] for number in range(count)]


def _read_request(path: Path, number: int, line: str, output_len: int) -> BenchRequest:
    try:
        value = json.loads(line)
        prompt, wanted = value["prompt"], value.get("output_tokens", output_len)
    except (ValueError, KeyError, TypeError, AttributeError):
        prompt = wanted = None
    if not isinstance(prompt, str) or not isinstance(wanted, int) or wanted < 1:
        raise DataError(f'{path}, line {number}: write {{"prompt": "a text"}}, one object a line.')
    return BenchRequest(prompt=prompt, max_tokens=wanted)


def bodies(
    asks: Sequence[BenchRequest], model: str, extra: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The requests as the API takes them; `extra` holds sampling options."""
    common = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **extra}
    return [{**common, "prompt": ask.prompt, "max_tokens": ask.max_tokens} for ask in asks]


async def send_all(
    client: Client, requests: Sequence[Mapping[str, Any]], traffic: ArrivalProcess
) -> tuple[list[RawResponse], float]:
    """Send completion requests; their outcomes in order, and the seconds that all took."""
    gate = asyncio.Semaphore(traffic.max_concurrency or max(1, len(requests)))
    began = time.perf_counter()

    async def one(request: Mapping[str, Any], delay: float) -> RawResponse:
        await asyncio.sleep(began + delay - time.perf_counter())
        outcome = RawResponse()
        async with gate:
            outcome.started = time.perf_counter()
            try:
                async with aclosing(client.stream("/v1/completions", request)) as events:
                    async for data in events:
                        outcome.times.append(time.perf_counter())
                        outcome.events.append(data)
            except MorError as error:
                outcome.error = str(error)
        return outcome

    delays = traffic.delays(len(requests))
    outcomes = await asyncio.gather(*map(one, requests, delays))
    return outcomes, time.perf_counter() - began


def parse_response(outcome: RawResponse) -> RequestResult:
    """What an outcome's events say.

    Raises:
        RequestError: the request failed, or nothing came.
    """
    if outcome.error:
        raise RequestError(outcome.error)
    times: list[float] = []
    token_ids: list[int] = []
    recursions: list[int] = []
    counted = 0
    usage: dict[str, Any] = {}
    for at, data in zip(outcome.times, outcome.events, strict=True):
        event = read_event(data)
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            ids = choice.get("token_ids") or ()
            if not ids and not choice.get("text"):
                continue
            counted += len(ids) or 1
            times.append(at)
            token_ids.extend(ids)
            recursions.extend(choice.get("recursion_counts") or ())
    if not times:
        raise RequestError("the server sent no token.")
    return RequestResult(
        ttft=times[0] - outcome.started,
        e2el=times[-1] - outcome.started,
        itl=[later - earlier for earlier, later in pairwise(times)],
        prompt_tokens=usage.get("prompt_tokens", 0),
        output_tokens=usage.get("completion_tokens", counted),
        token_ids=token_ids,
        recursions=recursions,
    )


def summarize(
    outcomes: Sequence[RawResponse],
    seconds: float,
    *,
    percentiles: Sequence[float] = (99,),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Rates and latencies of a run, under the keys that vLLM's results have.

    Args:
        goodput: the most milliseconds of `METRICS` that a good request takes.

    Raises:
        RequestError: no request came through; says why the first did not.
    """
    answers: list[RequestResult] = []
    errors: list[str] = []
    for outcome in outcomes:
        try:
            answers.append(parse_response(outcome))
        except RequestError as error:
            errors.append(str(error))
    if not answers:
        raise RequestError(f"none of {len(outcomes)} requests came through: {errors[0]}")
    tokens_in = sum(a.prompt_tokens for a in answers)
    tokens_out = sum(a.output_tokens for a in answers)
    recursions = [count for a in answers for count in a.recursions]
    good = sum(_is_good(a, goodput or {}) for a in answers) / seconds
    return {
        "duration": seconds,
        "completed": len(answers),
        "failed": len(errors),
        "errors": sorted(set(errors))[:3],
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(answers) / seconds,
        "request_goodput": good if goodput else None,
        "output_throughput": tokens_out / seconds,
        "total_token_throughput": (tokens_in + tokens_out) / seconds,
        "mean_recursions": sum(recursions) / len(recursions) if recursions else None,
        **_latencies(answers, percentiles),
    }


def _values(answer: RequestResult, metric: str) -> list[float]:
    """Milliseconds of a metric in one answer; none where it is not defined."""
    value = getattr(answer, metric)
    values = value if isinstance(value, list) else [value]
    return [1e3 * v for v in values if v is not None]


def _is_good(answer: RequestResult, goodput: Mapping[str, float]) -> bool:
    return all(
        max(_values(answer, name), default=0) <= maximum for name, maximum in goodput.items()
    )


def _latencies(
    answers: Sequence[RequestResult], percentiles: Sequence[float]
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in METRICS:
        values = [value for answer in answers for value in _values(answer, name)]
        for label, of in (("mean", np.mean), ("median", np.median), ("std", np.std)):
            found[f"{label}_{name}_ms"] = float(of(values)) if values else None
        for p in percentiles:
            value = float(np.percentile(values, p)) if values else None
            found[f"p{p:g}_{name}_ms"] = value
    return found
