"""Driving one engine through any course of events, with the oracle's answer to every request."""

import random
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

from engine_helpers import (
    EOS,
    MAX_STEPS,
    VOCAB,
    check_close,
    check_empty,
    check_same,
    memory_for,
    shared_model,
)
from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.engine.plan import BlockPlan, DecodePlan, PreludePlan
from mor.engine.request import SequenceState, TokenOutput
from mor.model.generation import generate
from mor.model.sampling import Completion, SamplingParams
from mor.model.transformer import MoRModel

MAX_PROMPT = 33
STARTS = (0, 5, 9, 17, 25, MAX_PROMPT - 1)
"""Tokens that a prompt takes from its stem, before its own last one."""
_SAMPLED = SamplingParams(max_tokens=6, temperature=1.2, top_p=0.9, seed=11, logprobs=2)
REQUEST_KINDS = (
    SamplingParams(max_tokens=1),
    SamplingParams(max_tokens=5, logprobs=1),
    SamplingParams(max_tokens=11),
    _SAMPLED,
    replace(_SAMPLED, max_tokens=9, top_k=9, repetition_penalty=1.3, stop_token_ids=(1, 2, 3)),
    replace(_SAMPLED, n=3, max_tokens=9, prompt_logprobs=True, stop_token_ids=tuple(range(20))),
    replace(_SAMPLED, max_tokens=8, ignore_eos=True, min_tokens=2, presence_penalty=0.5),
    SamplingParams(max_tokens=6, max_recursions=1),
    SamplingParams(max_tokens=6, min_recursions=1, max_recursions=1, prompt_logprobs=True),
)
"""What requests ask for; models that share layers in sequence take all but the last two."""


def _model(kind: str) -> MoRModel:
    return shared_model(kind, eos_token_id=EOS, num_block_layers=1)


Asked = tuple[tuple[int, ...], SamplingParams]


@cache
def _answers(kind: str) -> dict[Asked, list[Completion]]:
    """What the oracle has said so far."""
    return {}


def answers(kind: str, asked: list[Asked]) -> list[list[Completion]]:
    """The oracle's completions of each request; those that are new are computed together."""
    known = _answers(kind)
    new = [one for one in dict.fromkeys(asked) if one not in known]
    done = iter(generate(_model(kind), *zip(*new, strict=True)) if new else [])
    for one in new:
        known[one] = [next(done) for _ in range(one[1].n)]
    return [known[one] for one in asked]


class EngineDriver:
    """One engine with tight memory, the requests that it was given, and what happened to them."""

    def __init__(self, kind: str, fields: dict[str, Any], share: float = 1.0) -> None:
        self.kind = kind
        model = _model(kind)
        max_length = MAX_PROMPT + max(params.max_tokens for params in REQUEST_KINDS)
        memory = memory_for(model, fields["block_size"], max_length, share)
        self.llm = LLM(model, EngineConfig(**fields, kv_cache_memory_bytes=memory))
        self._scheduler = self.llm.scheduler
        self.happened: Counter[str] = Counter()
        self._asked: dict[str, Asked] = {}
        self._heard: dict[str, list[TokenOutput]] = {}
        self._done: list[tuple[str, list[Completion]]] = []
        rng = random.Random(kind)
        self._stems = [[rng.randrange(VOCAB) for _ in range(MAX_PROMPT)] for _ in range(2)]
        self._watch()

    def victims(self) -> list[str]:
        """One request in each of the states that there are now, and one that nobody knows."""
        under_way = [s.request_id for s in (*self._scheduler.running, *self._scheduler.waiting)]
        found = {state: name for name in under_way for state in self.states(name)}
        return ["nobody", *(found[state] for state in sorted(found))]

    def add(self, stem: int, start: int, last: int, course: int) -> None:
        """A new request."""
        prompt = (*self._stems[stem][:start], last)
        courses = REQUEST_KINDS[:-2] if self.kind == "sequence" else REQUEST_KINDS
        params = courses[course % len(courses)]
        name = self.llm.add_request(prompt, params)
        self._asked[name], self._heard[name] = (prompt, params), []
        self.happened["requests"] += 1

    def step(self) -> None:
        """One step."""
        for event in self.llm.step():
            self._heard[event.request_id].append(event)
            if event.completions is not None:
                self._done.append((event.request_id, event.completions))
        self.llm.check_integrity()
        self.happened["steps"] += 1

    def drain(self) -> None:
        """Step until all requests are done."""
        for _ in range(MAX_STEPS):
            if not self.llm.has_unfinished_requests:
                break
            self.step()
        assert not self.llm.has_unfinished_requests, "the engine makes no progress"

    def abort(self, name: str) -> None:
        """Stop a request in whatever state it is; what it gives is the beginning of the truth."""
        states = self.states(name)
        completions = self.llm.abort(name)
        self.llm.check_integrity()
        self.happened.update(f"abort {state}" for state in states or {"unknown"})
        if states:
            assert [c.index for c in completions] == list(range(self._asked[name][1].n))
            self._done.append((name, completions))
        else:
            assert completions == []

    def close(self) -> None:
        """Finish everything, hold it to the oracle, and see that the engine is empty."""
        self.drain()
        wanted = answers(self.kind, [self._asked[name] for name, _ in self._done])
        for (name, completions), wants in zip(self._done, wanted, strict=True):
            for completion, want in zip(completions, wants, strict=True):
                if completion.finish_reason == "abort":
                    _check_beginning(completion, want)
                else:
                    check_same(completion, want)
                self._check_events(name, completion)
        self.happened["preemptions"] += self._scheduler.num_preemptions
        self.happened["completions"] += len(self._done)
        check_empty(self.llm)

    def _check_events(self, name: str, completion: Completion) -> None:
        heard = [e for e in self._heard[name] if e.index == completion.index]
        assert [e.token_id for e in heard] == completion.token_ids
        assert [e.recursion_count for e in heard] == completion.recursion_counts
        assert [e.logprob for e in heard] == completion.logprobs
        reasons = [e.finish_reason for e in heard]
        if completion.finish_reason != "abort":
            assert reasons.pop() == completion.finish_reason
        assert reasons == [None] * len(reasons)

    def _sequences(self, name: str) -> list[SequenceState]:
        both = (*self._scheduler.running, *self._scheduler.waiting)
        return [s for s in both if s.request_id == name]

    def states(self, name: str) -> set[str]:
        """Where a request's completions are; nothing if all are done."""
        return {self._state(s) for s in self._sequences(name)}

    def _state(self, sequence: SequenceState) -> str:
        if len(self._sequences(sequence.request_id)) < sequence.params.n:
            return "half done"
        if sequence in self._scheduler.waiting:
            return "preempted" if sequence.output_token_ids else "waiting"
        if sequence.num_scheduled_tokens < sequence.num_prompt_tokens:
            return "in prefill"
        return "in the block" if any(c.active for c in sequence.chunks) else "before the coda"

    def _watch(self) -> None:
        """Count what the plans hold."""
        scheduler = self._scheduler
        schedule_prelude, schedule_block = scheduler.schedule_prelude, scheduler.schedule_block

        def entering() -> PreludePlan:
            plan = schedule_prelude()
            self.happened["pages copied"] += len(plan.page_copies)
            for chunk in plan.chunks:
                sequence = chunk.sequence
                self.happened["later chunks"] += (
                    sequence.num_cached_tokens < chunk.start < (sequence.num_prompt_tokens - 1)
                )
                self.happened["prefix hits"] += chunk.start == sequence.num_cached_tokens > 0
            return plan

        def advancing() -> BlockPlan:
            plan = schedule_block()
            self.happened["mixed depths"] += len({c.depth for c in plan.chunks}) > 1
            return plan

        scheduler.schedule_prelude, scheduler.schedule_block = entering, advancing  # type: ignore[method-assign]
        if (multi_step := self.llm.multi_step) is not None:
            schedule = multi_step.schedule

            def decoding() -> DecodePlan | None:
                plan = schedule()
                self.happened["steps in a row"] += plan is not None
                return plan

            multi_step.schedule = decoding  # type: ignore[method-assign]


def _check_beginning(completion: Completion, want: Completion) -> None:
    num, num_prompt = len(completion.token_ids), len(completion.prompt_recursion_counts)
    assert completion.token_ids == want.token_ids[:num]
    assert completion.recursion_counts == want.recursion_counts[:num]
    assert completion.prompt_recursion_counts == want.prompt_recursion_counts[:num_prompt]
    check_close(completion.logprobs, want.logprobs[:num], 1e-6)
    scored = completion.prompt_logprobs
    check_close(scored, want.prompt_logprobs[: len(scored)], 1e-6)
