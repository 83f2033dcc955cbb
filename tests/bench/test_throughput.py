"""The throughput benchmark on models that take milliseconds: what it counts, and its bounds."""

import dataclasses
from itertools import pairwise
from typing import Any

import pytest

from mor.bench.throughput import (
    ThroughputConfig,
    flops_bound,
    interleave,
    measure,
    overhead,
    ratios,
)
from mor.bench.workload import (
    Measurement,
    RequestShape,
    SteadyLoad,
    engine,
    random_model,
    request_flops,
)
from mor.errors import ConfigError
from mor.model.config import MoRConfig
from mor.model.cost import decode_flops, sequence_flops
from tiny import tiny_config, tiny_model


class TinyConfig(ThroughputConfig):
    """The same settings for tiny models."""

    def model_config(self, recursions: int) -> MoRConfig:
        kind = "expert" if recursions > 1 else "vanilla"
        return tiny_config(kind, **({"num_recursions": recursions} if recursions > 1 else {}))


def settings(**changes: Any) -> TinyConfig:
    values: dict[str, Any] = {"max_num_seqs": 4, "prompt": 8, "output": 6, "seconds": 0.05}
    return TinyConfig(**{**values, "rounds": 2, "models": ("mor3",), **changes})


def test_a_load_keeps_its_sequences_in_flight() -> None:
    load = SteadyLoad(engine(tiny_model(), 4), 4, RequestShape(prompt=8, output=6))
    for _ in range(40):
        load._step()
        assert len(load.llm.scheduler.running) + len(load.llm.scheduler.waiting) == 4
        load.llm.check_integrity()


def test_a_measurement_counts_what_the_engine_generated() -> None:
    load = SteadyLoad(engine(tiny_model(), 4), 4, RequestShape(prompt=8, output=6))
    load.reset()
    measurement = load.run(0.2)
    assert measurement.tokens == load.llm.stats.tokens > 0
    assert measurement.tokens_per_s == pytest.approx(
        measurement.steady_tokens / measurement.seconds
    )
    assert measurement.prompt_tokens % 8 == 0


def test_decode_only_starts_no_new_requests() -> None:
    load = SteadyLoad(
        engine(tiny_model(), 3), 3, RequestShape(prompt=8, output=20), staggered=False
    )
    while load.llm.has_unfinished_requests:
        load._step()
    with pytest.raises(ConfigError, match=r"ended after 20 tokens.*raise --output"):
        load.run(0.01)


def test_random_models_keep_the_configured_share_at_each_depth() -> None:
    config = dataclasses.replace(tiny_config(num_recursions=4), thresholds=None)
    model = random_model(config, 64)
    load = SteadyLoad(engine(model, 8), 8, RequestShape(prompt=40, output=40))
    histogram = load.llm.stats.depth_histogram
    for _ in range(50):  # a busy machine may need more than one second
        load.run(0.2)
        if all(histogram[1:]):
            break
    assert histogram[0] == 0
    assert all(count > 0 for count in histogram[1:])


def test_a_measurement_counts_work_in_the_long_runs_mix() -> None:
    load = settings().load(1)
    measured = [load.run(0.1) for _ in range(6)]
    whole = sum(measured, Measurement())
    assert whole.tokens == sum(w.tokens for w in measured)
    decode = decode_flops(load.llm.model_config, 8 + 3).mean
    prompt = sequence_flops(load.llm.model_config, 8)
    each = prompt.mean - prompt.head
    work = whole.tokens * decode + whole.prompt_tokens * each
    assert whole.steady_tokens * (decode + each * 8 / 6) == pytest.approx(work)
    assert whole.prompt_tokens % 8 == 0 < whole.prompt_tokens


def test_request_flops_are_prefill_and_decode() -> None:
    config = tiny_config("vanilla")
    shape = RequestShape(prompt=10, output=5)
    prefill, decode = sequence_flops(config, 10), decode_flops(config, 12)
    wanted = (prefill.mean - prefill.head) * 10 + prefill.head + 4 * decode.mean
    assert request_flops(config, shape) == pytest.approx(wanted)


def test_the_bound_is_one_for_a_model_like_vanilla() -> None:
    same = settings()
    assert flops_bound(same, 1, [0, 10]) == pytest.approx(1)
    assert flops_bound(same, 3, [0, 10, 0, 0]) > flops_bound(same, 3, [0, 0, 0, 10])
    decode = settings(decode_only=True)
    assert flops_bound(decode, 3, [0, 10, 0, 0]) > flops_bound(decode, 3, [0, 0, 0, 10])


def test_steps_alternate_and_the_first_round_does_not_count() -> None:
    a, b = settings().load(3), settings().load(1)
    turns: list[str] = []
    for name, load in (("a", a), ("b", b)):
        step = load._step
        load._step = lambda name=name, step=step: turns.append(name) or step()  # type: ignore[method-assign]
    pairs = interleave(a, b, rounds=3, seconds=0.3)
    assert len(pairs) == 3
    assert sum(one != other for one, other in pairwise(turns)) > len(turns) / 3
    for pair in pairs:
        assert all(side.seconds >= 0.3 for side in pair)
        assert abs(pair[0].seconds - pair[1].seconds) < 0.3
    assert all(side.tokens > 0 for pair in pairs for side in pair)
    assert 0 < overhead(a.llm) < 1


def test_the_ratio_is_the_median_of_rounds() -> None:
    measured = [Measurement(seconds=1, steady_tokens=n) for n in (10, 30, 20)]
    one = Measurement(seconds=1, steady_tokens=10)
    found = ratios([(w, one) for w in measured])
    assert (found["ratio"], found["ratio_min"], found["ratio_max"]) == (2, 1, 3)
    assert found["ratio_of_sums"] == 2
    longer = ratios(
        [
            (Measurement(seconds=3, steady_tokens=30), one),
            (Measurement(seconds=1, steady_tokens=30), one),
        ]
    )
    assert (longer["ratio"], longer["ratio_of_sums"]) == (2, 1.5)


def test_too_long_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="positions"):
        settings(prompt=90, output=90).load(3)


def test_multi_step_runs_are_compared_with_their_like() -> None:
    loads: list[tuple[int, str]] = []

    class Noting(TinyConfig):
        def load(self, *args: Any, **fields: Any) -> SteadyLoad:
            found = super().load(*args, **fields)
            loads.append((found.llm.backend.num_scheduler_steps, found.llm.config.batching))
            return found

    tiny = {"max_num_seqs": 3, "prompt": 8, "output": 6, "seconds": 0.1, "rounds": 1}
    record = measure(Noting(**tiny, models=("mor3",), num_scheduler_steps=2), lambda _: None)
    assert loads == [(2, "depth"), (2, "depth"), (1, "sequence"), (1, "depth")]
    assert record["depth_over_sequence"]["mor3"] > 0
