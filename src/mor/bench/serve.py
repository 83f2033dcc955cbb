"""Sends requests to an OpenAI-compatible server and computes their latencies and throughput.

Names and meanings are those of vLLM's `vllm bench serve`. While requests run, only each event's
bytes and time are stored; they are parsed when all requests have ended, so that parsing does not
delay what is being timed.
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
    """A prompt, as text or token ids, and the number of tokens to generate."""

    prompt: str | list[int]
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class ArrivalProcess:
    """When requests are sent: the gaps between them have a gamma distribution."""

    request_rate: float = math.inf
    """Requests per second; infinite sends all at once."""
    burstiness: float = 1.0
    """Shape of that distribution: 1 is a Poisson process, less comes in bursts, more evenly."""
    max_concurrency: int | None = None
    """Requests under way at most; the time that others wait for their turn is not counted."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.request_rate > 0:
            raise ConfigError(f"--request-rate={self.request_rate} must be above 0, or inf.")
        if not 0 < self.burstiness < math.inf:
            raise ConfigError(f"--burstiness={self.burstiness} must be above 0; 1 is Poisson.")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"--max-concurrency={self.max_concurrency} must be at least 1.")

    def delays(self, count: int) -> list[float]:
        """Seconds from the start to the sending of each request; the first is 0."""
        if math.isinf(self.request_rate):
            return [0.0] * count
        draw, at = random.Random(self.seed), 0.0
        times: list[float] = []
        for _ in range(count):
            times.append(at)
            # The mean of a gap is shape * scale = 1 / request_rate.
            at += draw.gammavariate(self.burstiness, 1 / (self.request_rate * self.burstiness))
        return times


@dataclass(kw_only=True)
class RawResponse:
    """The events of a request, not parsed. Times are in seconds of `time.perf_counter`."""

    start: float = 0.0
    """When the request was sent."""
    times: list[float] = field(default_factory=list)
    """When each of the events came."""
    events: list[bytes] = field(default_factory=list)
    error: str = ""
    """Why the request failed; empty if it did not."""


@dataclass(kw_only=True)
class RequestResult:
    """Latencies and tokens of a request that succeeded. Times are in seconds."""

    ttft: float
    """From sending the request to the first token."""
    e2el: float
    """From sending the request to the last token."""
    itl: list[float]
    """Between each two events with tokens that follow each other."""
    prompt_tokens: int
    output_tokens: int
    token_ids: list[int]
    """Of the output; empty where the server does not send them."""
    recursions: list[int]
    """Recursion count of each output token; empty where the server does not send them."""

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first; None where there is no second one."""
        if self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)


def random_requests(
    count: int, *, input_len: int, output_len: int, vocab_size: int, spread: float, seed: int
) -> list[BenchRequest]:
    """Requests whose prompts are random token ids.

    Args:
        input_len: mean length of a prompt.
        output_len: mean number of tokens to generate.
        spread: lengths are drawn evenly from `1 - spread` to `1 + spread` times their mean.

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
    """Requests from a file of JSON lines with the key `prompt` and optionally `output_tokens`.

    They come in a random order, which repeats if the file has fewer than `count`.

    Args:
        output_len: tokens to generate where a line names no `output_tokens`.

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
    requests = [
        _read_request(path, n, line, output_len) for n, line in enumerate(lines, 1) if line.strip()
    ]
    if not requests:
        raise DataError(f"{path}: there is no prompt in it.")
    random.Random(seed).shuffle(requests)
    return [requests[i % len(requests)] for i in range(count)]


def _read_request(path: Path, number: int, line: str, output_len: int) -> BenchRequest:
    try:
        value = json.loads(line)
        prompt = value["prompt"]
        max_tokens = value.get("output_tokens", output_len)
    except (ValueError, KeyError, TypeError, AttributeError):
        prompt, max_tokens = None, None
    if not isinstance(prompt, str) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise DataError(f'{path}, line {number}: write {{"prompt": "a text"}}, one object a line.')
    return BenchRequest(prompt=prompt, max_tokens=max_tokens)


def completion_bodies(
    requests: Sequence[BenchRequest], model: str, extra: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Bodies of `/v1/completions` for the requests; `extra` holds sampling options."""
    common = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **extra}
    return [{**common, "prompt": r.prompt, "max_tokens": r.max_tokens} for r in requests]


async def send_all(
    client: Client, bodies: Sequence[Mapping[str, Any]], arrivals: ArrivalProcess
) -> tuple[list[RawResponse], float]:
    """Send completion requests; their responses in the same order, and the seconds of them all."""
    places = asyncio.Semaphore(arrivals.max_concurrency or max(1, len(bodies)))
    began = time.perf_counter()

    async def send(body: Mapping[str, Any], delay: float) -> RawResponse:
        await asyncio.sleep(began + delay - time.perf_counter())
        response = RawResponse()
        async with places:
            response.start = time.perf_counter()
            try:
                async with aclosing(client.stream("/v1/completions", body)) as events:
                    async for data in events:
                        response.times.append(time.perf_counter())
                        response.events.append(data)
            except MorError as error:
                response.error = str(error)
        return response

    delays = arrivals.delays(len(bodies))
    responses = await asyncio.gather(*map(send, bodies, delays))
    return responses, time.perf_counter() - began


def parse_response(response: RawResponse) -> RequestResult:
    """The latencies and tokens of a response.

    Raises:
        RequestError: the request failed, or no token came.
    """
    if response.error:
        raise RequestError(response.error)
    times: list[float] = []  # of events with tokens
    token_ids: list[int] = []
    recursions: list[int] = []
    counted = 0  # tokens, for servers that send no usage
    usage: dict[str, Any] = {}
    for at, data in zip(response.times, response.events, strict=True):
        event = read_event(data)
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            ids = choice.get("token_ids") or ()
            if not ids and not choice.get("text"):
                continue
            counted += len(ids) or 1  # without ids an event counts as one token
            times.append(at)
            token_ids.extend(ids)
            recursions.extend(choice.get("recursion_counts") or ())
    if not times:
        raise RequestError("the server sent no token.")
    return RequestResult(
        ttft=times[0] - response.start,
        e2el=times[-1] - response.start,
        itl=[later - earlier for earlier, later in pairwise(times)],
        prompt_tokens=usage.get("prompt_tokens", 0),
        output_tokens=usage.get("completion_tokens", counted),
        token_ids=token_ids,
        recursions=recursions,
    )


def summarize(
    responses: Sequence[RawResponse],
    seconds: float,
    *,
    percentiles: Sequence[float] = (99,),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Throughput and latencies of a run, under the keys that vLLM's results have.

    Args:
        seconds: from the first request to the end of the last.
        percentiles: of every latency, from 0 to 100.
        goodput: by name in `METRICS`, the milliseconds that a good request takes at most.

    Raises:
        RequestError: no request succeeded; tells why the first did not.
    """
    results: list[RequestResult] = []
    errors: list[str] = []
    for response in responses:
        try:
            results.append(parse_response(response))
        except RequestError as error:
            errors.append(str(error))
    if not results:
        raise RequestError(f"none of {len(responses)} requests came through: {errors[0]}")
    tokens_in = sum(r.prompt_tokens for r in results)
    tokens_out = sum(r.output_tokens for r in results)
    recursions = [count for r in results for count in r.recursions]
    good = sum(_is_good(r, goodput or {}) for r in results) / seconds
    return {
        "duration": seconds,
        "completed": len(results),
        "failed": len(errors),
        "errors": sorted(set(errors))[:3],
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(results) / seconds,
        "request_goodput": good if goodput else None,
        "output_throughput": tokens_out / seconds,
        "total_token_throughput": (tokens_in + tokens_out) / seconds,
        "mean_recursions": sum(recursions) / len(recursions) if recursions else None,
        **_latencies(results, percentiles),
    }


def _values(result: RequestResult, metric: str) -> list[float]:
    """The values of a metric in one result, in milliseconds; none where it is not defined."""
    value = getattr(result, metric)
    values = value if isinstance(value, list) else [value]
    return [1e3 * v for v in values if v is not None]


def _is_good(result: RequestResult, goodput: Mapping[str, float]) -> bool:
    return all(
        max(_values(result, name), default=0) <= maximum for name, maximum in goodput.items()
    )


def _latencies(
    results: Sequence[RequestResult], percentiles: Sequence[float]
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in METRICS:
        values = [value for result in results for value in _values(result, name)]
        for label, of in (("mean", np.mean), ("median", np.median), ("std", np.std)):
            found[f"{label}_{name}_ms"] = float(of(values)) if values else None
        for p in percentiles:
            value = float(np.percentile(values, p)) if values else None
            found[f"p{p:g}_{name}_ms"] = value
    return found
