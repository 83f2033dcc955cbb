"""Any course of events leaves the engine whole, and every request with what the oracle says."""

import random
from collections import Counter
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine_driver import REQUEST_KINDS, STARTS, EngineDriver
from engine_helpers import engine_settings

MACHINE_KINDS = ("expert", "expert_bare", "token", "expert_shared", "sequence")
HAPPENINGS = (
    *("preemptions", "prefix hits", "pages copied", "later chunks", "mixed depths"),
    *("abort waiting", "abort preempted", "abort in prefill", "abort in the block"),
    *("abort before the coda", "abort half done", "abort unknown", "steps in a row"),
)


REQUEST = st.tuples(
    st.integers(0, 1),
    st.sampled_from(STARTS),
    st.integers(0, 1),
    st.integers(0, len(REQUEST_KINDS) - 1),
)


@st.composite
def settings_that_press(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of an EngineConfig that make requests get into each other's way."""
    maximum = draw(st.integers(2, 6))
    return {
        **draw(engine_settings()),
        "block_size": draw(st.sampled_from((1, 2, 3, 4, 7, 16))),
        "max_num_seqs": maximum,
        "max_num_batched_tokens": maximum + draw(st.integers(2, 20)),
        "min_exit_tokens": draw(st.integers(1, maximum)),
        "enable_prefix_caching": draw(st.integers(0, 3)) < 3,
    }


class EngineMachine(RuleBasedStateMachine):
    """Requests come, run and are aborted at any moment."""

    happened: ClassVar[Counter[str]] = Counter()

    @initialize(
        kind=st.sampled_from(MACHINE_KINDS), fields=settings_that_press(), share=st.floats(1, 1.5)
    )
    def start(self, kind: str, fields: dict[str, Any], share: float) -> None:
        self.drive = EngineDriver(kind, fields, share)

    @rule(requests=st.lists(REQUEST, min_size=1, max_size=4))
    def add(self, requests: list[tuple[int, int, int, int]]) -> None:
        for request in requests:
            self.drive.add(*request)

    @precondition(lambda self: self.drive.llm.has_unfinished_requests)
    @rule(times=st.integers(1, 9))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.drive.step()

    @rule(back=st.integers(0, 9))
    def abort(self, back: int) -> None:
        victims = self.drive.victims()
        self.drive.abort(victims[-1 - back % len(victims)])

    @precondition(lambda self: len(self.drive.llm.prefix_cache or ()) > 8)
    @rule()
    def reset_prefix_cache(self) -> None:
        self.drive.llm.reset_prefix_cache()
        self.drive.llm.check_integrity()

    @precondition(lambda self: len(self.drive.llm.scheduler.waiting) > 2)
    @rule()
    def drain(self) -> None:
        self.drive.drain()

    def teardown(self) -> None:
        if hasattr(self, "drive"):
            self.drive.close()
            self.happened.update(self.drive.happened)


def run_machine(max_examples: int) -> Counter[str]:
    EngineMachine.happened.clear()
    few = settings(max_examples=max_examples, stateful_step_count=40)
    run_state_machine_as_test(EngineMachine, settings=few)
    return EngineMachine.happened


def test_any_course_of_events() -> None:
    happened = run_machine(5)
    assert happened["steps"] > 300
    assert happened["completions"] > 30


@pytest.mark.slow
def test_many_more_courses_of_events() -> None:
    assert run_machine(140)["steps"] > 10_000


def random_course(seed: int) -> Counter[str]:
    """Many things in one engine, in a random order."""
    rng = random.Random(seed)
    fields = {
        "block_size": 2,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 20,
        "chunked_prefill_size": 6,
    }
    fields["num_scheduler_steps"] = (1, 1, 3)[seed % 3]
    drive = EngineDriver(("expert", "token_shared", "expert_bare")[seed % 3], fields)
    for _ in range(40):
        for _ in range(rng.randint(0, 2)):
            course = rng.randrange(len(REQUEST_KINDS))
            drive.add(rng.randrange(2), rng.choice(STARTS), rng.randrange(2), course)
        for _ in range(rng.randint(0, 3)):
            drive.step()
        if rng.random() < 0.4:
            drive.abort(rng.choice(drive.victims()))
    drive.close()
    return drive.happened


def test_the_rare_things_do_happen() -> None:
    happened: Counter[str] = Counter()
    for seed in (5, 0, 1, 2, 3, 4, 6, 7, 8):  # the first two see them all today
        happened.update(random_course(seed))
        missing = [what for what in HAPPENINGS if not happened[what]]
        if not missing:
            break
    assert not missing, happened
