"""The scheduler keeps its limits, starves nobody, and brings every request to its end."""

import itertools
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_simulation import Simulation, after_the_first, always, by_token

from mor.engine.request import SequenceState


def largest_gap(steps: list[int]) -> int:
    return max(b - a for a, b in itertools.pairwise(steps))


def test_long_prompts_do_not_starve_decodes() -> None:
    sim = Simulation(
        max_num_batched_tokens=16,
        chunked_prefill_size=16,
        router=always,
        enable_prefix_caching=False,
    )
    decodes = [sim.add([n], 40) for n in range(4)]
    for n in range(20):
        sim.add([n] * 50, 1)
    sim.run()
    for sequence in decodes:
        assert largest_gap(sim.came[sequence.arrival_index]) == 3  # as if it were alone: R passes


def test_decodes_do_not_starve_a_long_prompt() -> None:
    sim = Simulation(max_num_batched_tokens=8, max_num_seqs=8, router=always)
    for n in range(7):
        sim.add([n], 300)
    for _ in range(10):
        sim.step()
    late = sim.add(list(range(60)), 1)
    for _ in range(60 * 3 + 10):  # room for one token: it takes R steps
        sim.step()
    assert len(late.output_token_ids) == 1


def test_a_stream_of_short_requests_starves_nobody() -> None:
    sim = Simulation(
        max_num_batched_tokens=6, max_num_seqs=3, chunked_prefill_size=4, pages=60, block_size=2
    )
    long = sim.add(list(range(30)), 8)
    for n in range(300):
        if not n % 2:
            sim.add([n % 7, n % 3, 1], 1 + n % 5)
        sim.step()
        if len(long.output_token_ids) == 8:
            break
    assert len(long.output_token_ids) == 8
    sim.run()


@pytest.mark.parametrize("batching", ["depth", "sequence"])
def test_who_came_first_gets_the_first_token_first(batching: str) -> None:
    sim = Simulation(
        max_num_batched_tokens=12, chunked_prefill_size=5, batching=batching, max_num_seqs=4
    )
    for n in range(9):
        sim.add([n] * 20, 3)
    sim.run()
    firsts = [steps[0] for steps in sim.came.values()]
    assert firsts == sorted(firsts)


def test_the_oldest_is_never_preempted() -> None:
    sim = Simulation(pages=44, block_size=2, max_num_seqs=5, router=always)
    for n in range(5):
        sim.add([n] * 4, 16)
    lost: list[int] = []
    original = SequenceState.reset

    def reset(sequence: SequenceState) -> None:
        lost.append(sequence.arrival_index)
        assert sequence.arrival_index > min(
            s.arrival_index for s in (sequence, *sim.scheduler.running)
        )
        original(sequence)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceState, "reset", reset)
        sim.run()
    assert sim.scheduler.num_preemptions == len(lost) >= 4
    assert all(len(s.output_token_ids) == 16 for s in sim.sequences)


@st.composite
def situations(draw: st.DrawFn) -> tuple[dict[str, Any], list[tuple[list[int], int, int, int]]]:
    """Settings of a scheduler, and requests: prompt, tokens, limit of recursions, arrival."""
    maximum = draw(st.integers(1, 5))
    fields = {
        "block_size": draw(st.integers(1, 5)),
        "max_num_seqs": maximum,
        "max_num_batched_tokens": maximum + draw(st.integers(0, 12)),
        "chunked_prefill_size": draw(st.integers(1, 12)),
        "batching": draw(st.sampled_from(("depth", "sequence"))),
        "min_exit_tokens": draw(st.integers(1, maximum)),
        "max_exit_wait_steps": draw(st.integers(0, 4)),
        "enable_prefix_caching": draw(st.booleans()),
        "shared_kv": draw(st.booleans()),
        "recursions": draw(st.integers(1, 4)),
    }
    routers = always if fields["recursions"] == 1 else by_token
    fields["router"] = after_the_first if fields["shared_kv"] else routers
    rng = random.Random(draw(st.integers(0, 999)))
    stem = [rng.randrange(5) for _ in range(20)]
    requests = [
        (
            [*stem[: rng.randrange(20)], rng.randrange(5)],
            rng.randint(1, 12),
            rng.randint(0, fields["recursions"]),
            rng.randrange(20),
        )
        for _ in range(draw(st.integers(1, 8)))
    ]
    max_length = max(len(prompt) + tokens for prompt, tokens, _, _ in requests)
    tables = 2 if fields["shared_kv"] else 1 + fields["recursions"]
    minimum = tables * -(-max_length // fields["block_size"])
    fields["pages"] = minimum + draw(st.integers(0, minimum))
    return fields, requests


@given(situation=situations())
def test_every_request_comes_to_its_end(
    situation: tuple[dict[str, Any], list[tuple[list[int], int, int, int]]],
) -> None:
    fields, requests = situation
    sim = Simulation(**fields)
    for step in range(20):
        for prompt, tokens, limit, arrival in requests:
            if arrival == step:
                sim.add(
                    prompt,
                    tokens,
                    min_recursions=limit,
                    max_recursions=limit or fields["recursions"],
                )
        sim.step()
    sim.run()
    for sequence in sim.sequences:
        assert len(sequence.output_token_ids) == sequence.params.max_tokens
        assert len(sequence.recursion_counts) == len(sequence.token_ids) - 1
        for position, count in enumerate(sequence.recursion_counts):
            alone = next(
                (
                    d
                    for d in range(sequence.max_recursions)
                    if not sim.router(sequence, position, d)
                ),
                sequence.max_recursions,
            )
            assert count == max(alone, sequence.min_recursions)
    if sim.prefix_cache is not None:
        sim.prefix_cache.clear()
    assert sim.pool.num_free == sim.pool.num_pages
    assert len(sim.scheduler._free_state_slots) == sim.scheduler.num_state_slots


def test_depth_batching_mixes_depths_and_sequence_batching_never_does() -> None:
    depths: dict[str, list[set[int]]] = {}
    for batching in ("depth", "sequence"):
        sim = Simulation(batching=batching, chunked_prefill_size=4)
        for n in range(6):
            sim.add([n] * (3 * n + 1), 8)
        sim.run()
        depths[batching] = [{run.depth for run in plan} for plan in sim.advances]
    assert max(map(len, depths["sequence"])) == 1
    assert max(map(len, depths["depth"])) == 3
    assert {depth for found in depths["sequence"] for depth in found} == {0, 1, 2}


@pytest.mark.parametrize(("num_shallow", "wait"), [(3, 3), (6, 0)])
def test_exits_wait_for_company_but_not_for_ever(num_shallow: int, wait: int) -> None:
    sim = Simulation(
        min_exit_tokens=5,
        max_exit_wait_steps=3,
        recursions=8,
        router=lambda s, _, depth: depth == 0 or s.arrival_index >= num_shallow,
    )
    for n in range(7):
        sim.add([n], 40)
    sim.run()
    waits = set()
    for step, (chunks, others) in enumerate(zip(sim.finishes, sim.others, strict=True), start=1):
        if chunks and others:
            waited = max(step - chunk.exited_at_step for chunk in chunks) - 1
            assert len(chunks) >= 5 or waited == 3
            waits.add(waited)
    assert wait in waits
    assert max(waits) <= 3


@pytest.mark.parametrize(("num_shallow", "max_length"), [(3, 0), (2, 2)])
def test_by_default_exits_wait_for_half_of_the_sequences(num_shallow: int, max_length: int) -> None:
    sim = Simulation(
        recursions=8, router=lambda s, _, depth: depth == 0 or s.arrival_index >= num_shallow
    )
    for n in range(7):
        sim.add([n], 40)
    sim.run()
    waits = [
        step - chunk.exited_at_step - 1
        for step, (chunks, others) in enumerate(zip(sim.finishes, sim.others, strict=True), 1)
        for chunk in chunks
        if others
    ]
    assert max(waits) == max_length


def test_exits_do_not_wait_if_nothing_else_can_run() -> None:
    sim = Simulation(min_exit_tokens=8, max_exit_wait_steps=1000, router=always)
    sequence = sim.add([1], 10)
    assert sim.run() == 10 * 3 + 1
    assert len(sequence.output_token_ids) == 10


def test_a_chunk_follows_the_one_before_it_a_depth_behind() -> None:
    sim = Simulation(chunked_prefill_size=4, router=always, max_num_batched_tokens=64)
    sim.add(list(range(12)), 1)
    sim.run()
    found = [[(run.start, run.depth) for run in plan] for plan in sim.advances]
    assert found[:5] == [
        [(0, 0)],
        [(4, 0), (0, 1)],  # in the order of depths
        [(8, 0), (4, 1), (0, 2)],
        [(8, 1), (4, 2)],
        [(8, 2)],
    ]


def test_shared_keys_are_written_at_the_first_depth_only() -> None:
    sim = Simulation(shared_kv=True, router=after_the_first)
    for n in range(5):
        sim.add([n] * 7, 9)
    sim.run()
    for plan in sim.advances:
        assert [run.writes for run in plan] == [run.depth == 0 for run in plan]
        assert sorted((run.writes for run in plan), reverse=True) == [run.writes for run in plan]
    assert any({True, False} <= {run.writes for run in plan} for plan in sim.advances)


def test_a_prefix_with_other_counts_is_not_built_upon() -> None:
    """In float32 another batch may flip a router's decision: then two sequences with the same
    tokens have different entries, and neither may take the other's for its own."""
    for seed in range(8):
        rng = random.Random(seed)
        sim = Simulation(
            block_size=2, router=lambda *_, r=rng: r.random() < 0.5, chunked_prefill_size=6
        )
        for _ in range(8):
            sim.add([1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9], 4)
            sim.add([1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4], 3)
            for _ in range(rng.randrange(6)):
                sim.step()
        sim.run()
        assert all(len(s.output_token_ids) == s.params.max_tokens for s in sim.sequences)
