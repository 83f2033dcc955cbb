"""`Metrics`: counters and histograms for Prometheus, under vLLM's names with the prefix `mor:`.

Beyond vLLM's there are the recursion counts of tokens and the KV bytes of each depth. All methods
`record_*` are called in the engine's thread; the event loop only reads.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mor.engine.llm import LLM
from mor.engine.request import TokenOutput
from mor.model.sampling import FinishReason
from mor.serve.engine_state import EngineState

# Upper ends of the histograms' buckets, those of vLLM.
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_LONG = (*_SECONDS[6:], 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
_WINDOW_S = 5.0
"""`tokens_per_s` is the mean over so many seconds."""


@dataclass(kw_only=True)
class _Timing:
    """Times of one engine request, in seconds of `time.monotonic`."""

    arrival: float
    num_prompt_tokens: int
    start: float | None = None
    """When its first sequence left the waiting list."""
    first_token: float | None = None
    last_token: dict[int, float] = field(default_factory=dict)
    """By completion: the time of its latest token."""
    num_tokens: dict[int, int] = field(default_factory=dict)
    """By completion: how many tokens it has."""


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, model_name: str, num_recursions: int) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        self._timings: dict[str, _Timing] = {}
        """By the ids of the engine's requests that are under way."""
        self._waiting_timings: dict[str, _Timing] = {}
        """Those of them that have not started."""
        self._steps: deque[tuple[float, int]] = deque()
        """The latest steps: when each ended, and its generated tokens."""
        self._durations = (0.0, 0)
        """Sum of the seconds that finished requests took, and their number."""
        self._seen_preemptions = 0
        self._running = self._gauge("num_requests_running", "Sequences in flight.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences that wait for a place.")
        self._usage = self._gauge("kv_cache_usage_perc", "Share of the pages in use, 0 to 1.")
        self._kv_bytes = Gauge(
            "mor:kv_cache_bytes",
            "Keys and values that running sequences hold, by depth of the block.",
            ("model_name", "depth"),
            registry=self._registry,
        )
        self._preemptions = self._counter("num_preemptions", "Sequences computed again.")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens looked up.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens that were found.")
        self._success = Counter(
            "mor:request_success",
            "Completions that ended.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        for reason in get_args(FinishReason):
            self._success.labels(**self._labels, finished_reason=reason)
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival.", _SECONDS)
        self._itl = self._histogram("inter_token_latency_seconds", "Between tokens.", _SECONDS)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to end.", _LONG)
        self._queue = self._histogram("request_queue_time_seconds", "Before the start.", _LONG)
        self._prefill = self._histogram("request_prefill_time_seconds", "To first token.", _LONG)
        self._decode = self._histogram("request_decode_time_seconds", "From first token.", _LONG)
        self._prompts = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._outputs = self._histogram("request_generation_tokens", "Of an answer.", _TOKENS)
        self._depth = self._histogram(
            "token_recursion_depth", "Recursions of a token.", tuple(range(num_recursions + 1))
        )

    def _gauge(self, name: str, about: str) -> Gauge:
        gauge = Gauge(f"mor:{name}", about, ("model_name",), registry=self._registry)
        return gauge.labels(**self._labels)

    def _counter(self, name: str, about: str) -> Counter:
        counter = Counter(f"mor:{name}", about, ("model_name",), registry=self._registry)
        return counter.labels(**self._labels)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"mor:{name}", about, ("model_name",), buckets=buckets, registry=self._registry
        )
        return histogram.labels(**self._labels)

    # -- recorded in the engine's thread ----------------------------------------------------------

    @property
    def request_ids(self) -> list[str]:
        """Ids of the engine's requests that are under way."""
        return list(self._timings)

    def record_arrival(self, request_id: str, num_prompt_tokens: int) -> None:
        """Start the times of a request that the engine has accepted."""
        timing = _Timing(arrival=time.monotonic(), num_prompt_tokens=num_prompt_tokens)
        self._timings[request_id] = self._waiting_timings[request_id] = timing

    def record_step(self, llm: LLM, outputs: list[TokenOutput]) -> None:
        """Count a step that has just ended and the tokens that it generated."""
        now = time.monotonic()
        if self._waiting_timings:
            waiting = {sequence.request_id for sequence in llm.scheduler.waiting}
            for request_id in [name for name in self._waiting_timings if name not in waiting]:
                timing = self._waiting_timings.pop(request_id)
                timing.start = now
                self._queue.observe(now - timing.arrival)
        for output in outputs:
            self._record_token(output, now)
        self._steps.append((now, len(outputs)))
        while self._steps[0][0] < now - _WINDOW_S:
            self._steps.popleft()

    def _record_token(self, output: TokenOutput, now: float) -> None:
        """Count one token, and with the last ones of a completion and a request also these."""
        timing = self._timings[output.request_id]
        if timing.first_token is None:
            timing.first_token = now
            self._ttft.observe(now - timing.arrival)
            self._prefill.observe(now - (timing.start or now))
            self._prompt.inc(timing.num_prompt_tokens)
            self._prompts.observe(timing.num_prompt_tokens)
        if output.prompt is not None:  # comes with a completion's first token
            self._queries.inc(timing.num_prompt_tokens)
            self._hits.inc(output.prompt.num_cached_tokens)
        elif output.index in timing.last_token:
            self._itl.observe(now - timing.last_token[output.index])
        timing.last_token[output.index] = now
        timing.num_tokens[output.index] = timing.num_tokens.get(output.index, 0) + 1
        self._generated.inc()
        self._depth.observe(output.recursion_count)
        if output.finish_reason is not None:
            self._record_completion(output.finish_reason, timing.num_tokens[output.index])
        if output.completions is not None:  # comes with the request's last token
            self._e2e.observe(now - timing.arrival)
            self._decode.observe(now - timing.first_token)
            total, number = self._durations
            self._durations = total + now - timing.arrival, number + 1
            del self._timings[output.request_id]
            self._waiting_timings.pop(output.request_id, None)

    def _record_completion(self, reason: str, num_tokens: int) -> None:
        self._success.labels(**self._labels, finished_reason=reason).inc()
        self._outputs.observe(num_tokens)

    def record_end(self, request_id: str) -> None:
        """Count a request as aborted, unless its last token was recorded before."""
        timing = self._timings.pop(request_id, None)
        self._waiting_timings.pop(request_id, None)
        if timing is not None:
            self._success.labels(**self._labels, finished_reason="abort").inc()

    # -- read on the event loop -------------------------------------------------------------------

    @property
    def mean_seconds(self) -> float:
        """Seconds that a finished request took on average; 1 while there is none."""
        total, number = self._durations
        return total / number if number else 1.0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second over the last `_WINDOW_S` seconds; 0 when idle."""
        now = time.monotonic()
        recent = [(at, tokens) for at, tokens in list(self._steps) if at >= now - _WINDOW_S]
        if len(recent) < 2:
            return 0.0
        # The first step's tokens were generated before its end, where the stretch begins.
        return sum(tokens for _, tokens in recent[1:]) / max(now - recent[0][0], 1e-3)

    def exposition(self, state: EngineState | None) -> bytes:
        """The text that Prometheus reads; gauges keep their values where `state` is None."""
        if state is not None:
            self._running.set(state.running)
            self._waiting.set(state.waiting)
            self._usage.set(state.pages_used / state.pages_total)
            held = {"unshared": state.pages_unshared, **dict(enumerate(state.pages_by_depth))}
            for depth, pages in held.items():
                gauge = self._kv_bytes.labels(**self._labels, depth=str(depth))
                gauge.set(pages * state.page_bytes)
            # The engine keeps a total, Prometheus' counter takes what came on top.
            missing = state.preemptions - self._seen_preemptions
            self._preemptions.inc(missing)
            self._seen_preemptions = state.preemptions
        return generate_latest(self._registry)
