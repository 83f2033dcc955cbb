"""What the server has done, for Prometheus: vLLM's names under `mor:`, and recursion counts.

Counting happens in the engine's thread, tick by tick.
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

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_LONG = (*_SECONDS[6:], 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
_WINDOW = 5.0
"""Seconds that `tokens_per_s` looks back."""


@dataclass(kw_only=True)
class _Timing:
    """When things happened to one engine request."""

    arrived: float
    num_prompt_tokens: int
    started: float | None = None
    first: float | None = None
    last: dict[int, float] = field(default_factory=dict)
    """Time of each completion's latest token, .."""
    counts: dict[int, int] = field(default_factory=dict)
    """.. and their number."""


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, model_name: str, num_recursions: int) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        self._timings: dict[str, _Timing] = {}
        self._queued: dict[str, _Timing] = {}
        self._ticks: deque[tuple[float, int]] = deque()
        self._durations = (0.0, 0)
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

    # -- what happens -----------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Engine requests that are under way."""
        return list(self._timings)

    @property
    def mean_seconds(self) -> float:
        """Mean duration of the requests that are done."""
        total, number = self._durations
        return total / number if number else 1.0

    def record_arrival(self, name: str, num_prompt_tokens: int) -> None:
        """The engine has accepted a request."""
        timing = _Timing(arrived=time.monotonic(), num_prompt_tokens=num_prompt_tokens)
        self._timings[name] = self._queued[name] = timing

    def record_step(self, llm: LLM, events: list[TokenOutput]) -> None:
        """A tick is over, and these tokens came."""
        now = time.monotonic()
        if self._queued:
            waiting = {sequence.request_id for sequence in llm.scheduler.waiting}
            for name in [name for name in self._queued if name not in waiting]:
                timing = self._queued.pop(name)
                timing.started = now
                self._queue.observe(now - timing.arrived)
        for event in events:
            self._token(event, now)
        self._ticks.append((now, len(events)))
        while self._ticks[0][0] < now - _WINDOW:
            self._ticks.popleft()

    def _token(self, event: TokenOutput, now: float) -> None:
        timing = self._timings[event.request_id]
        if timing.first is None:
            timing.first = now
            self._ttft.observe(now - timing.arrived)
            self._prefill.observe(now - (timing.started or now))
            self._prompt.inc(timing.num_prompt_tokens)
            self._prompts.observe(timing.num_prompt_tokens)
        if event.prompt is not None:
            self._queries.inc(timing.num_prompt_tokens)
            self._hits.inc(event.prompt.num_cached_tokens)
        elif event.index in timing.last:
            self._itl.observe(now - timing.last[event.index])
        timing.last[event.index] = now
        timing.counts[event.index] = timing.counts.get(event.index, 0) + 1
        self._generated.inc()
        self._depth.observe(event.recursion_count)
        if event.finish_reason is not None:
            self._ended(event.finish_reason, timing.counts[event.index])
        if event.completions is not None:
            self._e2e.observe(now - timing.arrived)
            self._decode.observe(now - timing.first)
            total, number = self._durations
            self._durations = total + now - timing.arrived, number + 1
            del self._timings[event.request_id]
            self._queued.pop(event.request_id, None)

    def _ended(self, reason: str, num_tokens: int) -> None:
        self._success.labels(**self._labels, finished_reason=reason).inc()
        self._outputs.observe(num_tokens)

    def record_end(self, name: str) -> None:
        """A request is over; if it was not done, it was aborted."""
        timing = self._timings.pop(name, None)
        self._queued.pop(name, None)
        if timing is not None:
            self._success.labels(**self._labels, finished_reason="abort").inc()

    # -- what is asked ----------------------------------------------------------------------------

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second over the last seconds; 0 when idle."""
        now = time.monotonic()
        recent = [(at, tokens) for at, tokens in list(self._ticks) if at >= now - _WINDOW]
        if len(recent) < 2:
            return 0.0
        return sum(tokens for _, tokens in recent[1:]) / max(now - recent[0][0], 1e-3)

    def exposition(self, state: EngineState | None) -> bytes:
        """The text that Prometheus reads; without a state its gauges stay as they were."""
        if state is not None:
            self._running.set(state.running)
            self._waiting.set(state.waiting)
            self._usage.set(state.pages_used / state.pages_total)
            held = {"unshared": state.pages_unshared, **dict(enumerate(state.pages_by_depth))}
            for depth, pages in held.items():
                labelled = self._kv_bytes.labels(**self._labels, depth=str(depth))
                labelled.set(pages * state.page_bytes)
            missing = state.preemptions - self._seen_preemptions
            self._preemptions.inc(missing)
            self._seen_preemptions = state.preemptions
        return generate_latest(self._registry)
