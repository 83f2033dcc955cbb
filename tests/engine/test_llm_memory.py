"""What an engine holds: no more than it says, nothing of requests that are over; what it counts."""

import gc
import sys
import tracemalloc
from collections.abc import Callable

import pytest
import torch

from engine_helpers import VOCAB, check_empty, check_same, engine_of, shared_model, step_until
from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.model.cost import depth_fractions_of, kv_bytes_per_token
from mor.model.generation import generate
from mor.model.sampling import SamplingParams
from tiny import tiny_model

GREEDY = SamplingParams(max_tokens=10)


def run_short_requests(llm: LLM, num: int) -> None:
    """Many requests of one or two tokens, some streamed, some aborted."""
    for start in range(0, num, 50):
        for n in range(start, start + 50):
            params = SamplingParams(max_tokens=1 + n % 2, n=1 + (n % 10 == 0))
            llm.add_request([n % VOCAB, n // VOCAB % VOCAB], params, f"r{n}")
        llm.abort(f"r{start + 7}")
        while llm.has_unfinished_requests:
            llm.step()


def growth(llm: LLM, num: int, measure: Callable[[], int]) -> int:
    """By how much more there is after so many requests; nothing is under way then."""
    run_short_requests(llm, 100)
    gc.collect()
    before = measure()
    run_short_requests(llm, num)
    gc.collect()
    grown = measure() - before
    check_empty(llm)
    assert not llm.output_processor._streams
    assert len(llm.scheduler._free_state_slots) == llm.scheduler.num_state_slots
    return grown


def test_a_thousand_requests_leave_nothing_behind() -> None:
    llm = engine_of(
        "vanilla", max_num_seqs=50, max_num_batched_tokens=100, kv_cache_memory_bytes=2**18
    )
    assert growth(llm, 1000, sys.getallocatedblocks) < 1000  # less than one each


@pytest.mark.slow
def test_ten_thousand_requests_leave_nothing_behind() -> None:
    llm = engine_of(
        "vanilla", max_num_seqs=50, max_num_batched_tokens=100, kv_cache_memory_bytes=2**18
    )
    assert growth(llm, 10_000, sys.getallocatedblocks) < 2000
    tracemalloc.start()
    try:
        assert growth(llm, 500, lambda: tracemalloc.get_traced_memory()[0]) < 60_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "kind",
    ["vanilla", "recursive", "recursive_shared", "sequence", "expert", "expert_bare", "token"],
)
def test_a_sequence_takes_the_memory_that_the_cost_model_says(kind: str) -> None:
    llm = engine_of(kind)
    config = llm.model_config
    llm.add_request([1, 2, 3, 4, 5], SamplingParams(max_tokens=60))
    step_until(llm, 50)
    (sequence,) = llm.scheduler.running
    counts = sequence.recursion_counts
    histogram = [counts.count(passes) for passes in range(config.num_recursions + 1)]
    depth_fractions = depth_fractions_of(config, histogram)
    wanted = kv_bytes_per_token(config, depth_fractions=depth_fractions, bytes_per_value=8) * len(
        counts
    )
    taken = sum(len(table.pages) for table in sequence.page_tables) * llm.cache.page_bytes
    assert wanted <= taken <= wanted + len(sequence.page_tables) * llm.cache.page_bytes
    assert llm.pool.num_pages - llm.pool.num_free == taken // llm.cache.page_bytes


def test_a_known_prefix_is_not_computed_again() -> None:
    llm = engine_of("expert")
    prompt = list(range(18))
    (first,) = llm.generate([prompt], GREEDY)
    metadata = llm.stats.block_tokens
    for other, cached in ((prompt, 16), ([*prompt[:9], 60], 8), ([60, *prompt], 0)):
        llm.add_request(other, GREEDY)
        llm.step()
        (sequence,) = llm.scheduler.running
        assert sequence.num_cached_tokens == cached
        done = [e.completions for e in step_until(llm, 10) if e.completions]
        assert len(done[0][0].token_ids) == 10
        if other == prompt:
            check_same(done[0][0], first)
            assert llm.stats.block_tokens - metadata < metadata
        check_same(done[0][0], generate(shared_model("expert"), [other], GREEDY)[0])
    assert len(llm.prefix_cache or ()) > 6
    llm.reset_prefix_cache()
    llm.add_request(prompt, GREEDY)
    llm.step()
    assert llm.scheduler.running[0].num_cached_tokens == 0


def test_counters_count_what_happened() -> None:
    llm = engine_of("expert", enable_prefix_caching=False)
    done = llm.generate([[1, 2, 3], [4] * 9], GREEDY)
    counts = [count for c in done for count in c.recursion_counts]
    assert llm.stats.tokens == len(counts) == 20
    assert llm.stats.depth_histogram == [counts.count(passes) for passes in range(4)]
    prompts = [count for c in done for count in c.prompt_recursion_counts]
    last = sum(c.recursion_counts[0] for c in done)  # counted as a prompt's and as an output's
    assert llm.stats.block_tokens == sum(counts) + sum(prompts) - last
    assert 0 < llm.stats.compute_seconds <= llm.stats.seconds
    steps = llm.stats.steps
    assert llm.step() == []
    assert llm.stats.steps == steps
    llm.stats.reset()
    assert (llm.stats.steps, llm.stats.tokens, llm.stats.block_tokens) == (0, 0, 0)


def test_the_model_stays_as_it_was() -> None:
    model = tiny_model("token_loss_free").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    LLM(model, EngineConfig(kv_cache_memory_bytes=2**20)).generate(
        [[1, 2], [3]], SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    )
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_progress_is_shown_on_stderr_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    llm = engine_of()
    llm.generate([[1], [2]], GREEDY)
    assert capsys.readouterr() == ("", "")
    llm.generate([[1], [2]], GREEDY, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/2 requests" in err


def test_it_describes_itself_in_one_line() -> None:
    line = engine_of(kv_cache_memory_bytes=2**20).describe()
    assert "\n" not in line
    for word in ("reference kernels", "cpu", "float64 weights", "MiB", "pages"):
        assert word in line
