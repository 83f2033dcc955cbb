"""The side-by-side table and page."""

import dataclasses
import json

from mor.report.comparison import RunSummary, comparison_rows, depths, report_page, smoothed
from mor.report.html import ColoredText

RUN = RunSummary(
    name="MoR",
    parameters=4_000_000,
    parameters_non_embedding=1_000_000,
    flops_per_token=2e6,
    training_flops=3e12,
    tokens=500_000,
    seconds=80.0,
    memory_bytes=64 * 2**20,
    nll_topk=4.7123,
    nll_threshold=4.7456,
    depth_histogram=(0.0, 0.4, 0.35, 0.25),
    kv_bytes_per_token=3000.0,
    generated_per_s=123.4,
    curve=((1000, 8.0), (2000, 6.0), (3000, 5.0)),
)


def test_round_trip_through_json() -> None:
    assert RunSummary.from_dict(json.loads(json.dumps(RUN.as_dict()))) == RUN


def test_rows_hold_both_losses_and_the_histogram() -> None:
    other = dataclasses.replace(RUN, name="vanilla", nll_topk=5.0)
    rows = {row[0].strip(): row[1:] for row in comparison_rows([RUN, other])}
    assert rows["NLL, topk"] == ["4.7123", "5.0000"]
    assert rows["NLL, threshold"][0] == "4.7456"
    assert rows["recursions"][0] == "1:40% 2:35% 3:25%"
    assert rows["mean recursions"][0] == "1.85"


def test_tokens_that_take_no_recursion_are_shown() -> None:
    assert depths((0.1, 0.5, 0.4)) == "0:10% 1:50% 2:40%"


def test_smoothing_starts_at_the_first_value_and_follows() -> None:
    curve = [(i, 8.0) for i in range(5)] + [(i, 2.0) for i in range(5, 200)]
    values = smoothed(curve)
    assert values[0] == 8.0
    assert values[4] == 8.0 or abs(values[4] - 8.0) < 1e-9
    assert abs(values[-1] - 2.0) < 0.01


def test_page_holds_table_curves_and_sample() -> None:
    sample = ColoredText(pieces=["def", " f", "("], counts=[1, 2, 3], num_recursions=3)
    vanilla = dataclasses.replace(RUN, name="vanilla", depth_histogram=(0.0, 1.0))
    html = report_page(
        [RUN, vanilla],
        sample,
        title="A title",
        subtitle="sub",
        verdict="MoR < vanilla",
        footer="foot",
    )
    for words in ("4.7123", "A title", "MoR &lt; vanilla", "<svg", "recursions: 3 of 3"):
        assert words in html
