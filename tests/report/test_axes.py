"""Ticks of axes, and numbers as short texts."""

import pytest

from mor.report.axes import compact, nice_ticks, percent


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (4.711, 10.8), (-3, 7), (1e-5, 3e-5), (0, 1.44e6), (99.9, 100.1)]
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float) -> None:
    inside, outside = nice_ticks(low, high, 5), nice_ticks(low, high, 5, outward=True)
    step = outside[1] - outside[0]
    assert low <= inside[0] < inside[-1] <= high
    assert outside[0] <= low < outside[0] + step
    assert outside[-1] - step < high <= outside[-1]
    assert 3 <= len(inside) <= 8
    mantissa = f"{step:.3e}".split("e")[0]
    assert mantissa in ("1.000", "2.000", "2.500", "5.000")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (4.7114, "4.711"), (9999.9, "10k"), (1.44e6, "1.44M"), (-2.5e9, "-2.5B")],
)
def test_compact_numbers(value: float, text: str) -> None:
    assert compact(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0%"), (0.0001, "<0.1%"), (0.0432, "4.3%"), (0.0999, "10%"), (0.52, "52%"), (1, "100%")],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text
