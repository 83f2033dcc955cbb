"""Axes of charts: where values lie in the picture, which ticks there are, and numbers as texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

HUGE = 1e300
"""Values beyond it are gaps, because their differences could overflow."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A horizontal or vertical axis: maps values to SVG user units."""

    ends: tuple[float, float]
    """Values at both ends of the axis."""
    span: tuple[float, float]
    """Where these ends lie, in user units; a vertical axis goes from the bottom up."""
    ticks: tuple[tuple[float, str], ...]
    """Value and text of each tick."""
    log: bool = False
    """Whether equal distances are equal ratios; values must be positive then."""

    def place(self, value: float) -> float:
        """Where a finite value lies, in user units."""
        low, high = self.ends
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.span[0] + (value - low) / (high - low) * (self.span[1] - self.span[0])


def linear_axis(
    ends: tuple[float, float], span: tuple[float, float], ticks: Sequence[float]
) -> Axis:
    """A linear axis whose ticks have texts of one form."""
    return Axis(ends=ends, span=span, ticks=tuple(zip(ticks, tick_texts(ticks), strict=True)))


def x_axis_of(values: Sequence[float], span: tuple[float, float], log: bool) -> Axis:
    """A horizontal axis over all values, with about a tick for each 90 user units.

    The ticks of a logarithmic axis are powers of ten; if these are fewer than three, also 2 and 5
    times them; and if these are, round numbers.
    """
    low, high = extent(values, log=log)
    if not log:
        low = 0.0 if 0 < low < 0.1 * high else low  # begin at 0 where that costs little room
        target = max(3, int(span[1] - span[0]) // 90)
        return linear_axis((low, high), span, nice_ticks(low, high, target))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = [10.0**p for p in powers[:: -(-len(powers) // 9)]]  # at most nine of them
    finer = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    ticks: list[float] = []
    for candidates in (decades, finer, nice_ticks(low, high, 4)):
        # The margins keep a tick at an end, where rounding would lose it.
        ticks = [t for t in candidates if low * 0.999999 <= t <= high * 1.000001]
        if len(ticks) >= 3:
            break
    texts = tuple((tick, compact(tick)) for tick in ticks)
    return Axis(ends=(low, high), span=span, ticks=texts, log=True)


def nice_ticks(low: float, high: float, target: int, *, outward: bool = False) -> tuple[float, ...]:
    """About `target` round numbers from `low` to `high`, 1, 2, 2.5 or 5 times a power of ten apart.

    Args:
        outward: the first and the last one enclose the range, instead of lying within it.
    """
    assert low < high, (low, high)
    rough = (high - low) / target
    power = 10.0 ** math.floor(math.log10(rough))
    # The smallest round step that is not below the even one.
    step = power * next(m for m in (1, 2, 2.5, 5, 10, 20) if m * power >= rough * 0.999)
    first, last = low / step, high / step
    if outward:
        first, last = math.floor(first + 1e-6), math.ceil(last - 1e-6)
    else:
        first, last = math.ceil(first - 1e-6), math.floor(last + 1e-6)
    # Twelve digits: 3 * 0.1 becomes 0.3, not 0.30000000000000004.
    return tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))


def extent(values: Sequence[float], *, log: bool = False) -> tuple[float, float]:
    """The smallest and the largest value, moved apart if they are equal.

    Without values 0 to 1, or 1 to 10 for a logarithmic axis.
    """
    if not values:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if high - low > max(1e-9 * max(abs(low), abs(high)), 1 / HUGE):
        return low, high
    margin = 0.1 * abs(low) or 0.5
    return low - margin, high + margin


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """The texts of ticks, all with the same unit and the same number of decimals."""
    size = max((abs(tick) for tick in ticks), default=0.0)
    if size >= 1e15 or (0 < size < 1e-3):
        return [f"{tick:.3g}" for tick in ticks]
    scale, unit = _scale(size)
    step = min((b - a for a, b in pairwise(ticks)), default=size or 1.0) / scale
    # As many decimals as it takes to tell neighbors apart.
    decimals = next((d for d in range(9) if abs(round(step, d) - step) < 1e-6 * step), 9)
    return [f"{t / scale:.{decimals}f}{unit}" if t else "0" for t in ticks]


def aligned(values: Sequence[float]) -> list[str]:
    """`compact` texts with equally many decimals, unless one has a unit or an exponent."""
    texts = [compact(value) for value in values]
    if not all(text.replace(".", "").lstrip("-").isdigit() for text in texts):
        return texts
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    return [f"{value:.{decimals}f}" for value in values]


def compact(value: float) -> str:
    """A number in four digits, with k, M, B or T from 10,000 on: 1.44M, 4.711, 0."""
    value = float(f"{value:.4g}")  # first, so that 9999.6 becomes 10k
    size = abs(value)
    if size < 1e4 or size >= 1e15:
        return f"{value:.4g}"
    scale, unit = _scale(size)
    return f"{value / scale:.4g}{unit}"


def percent(share: float) -> str:
    """A share as percent: 52%, 4.3%, <0.1%, and a dash if it is not finite."""
    if not math.isfinite(share):
        return "\N{EN DASH}"
    if 0 < share < 0.001:
        return "<0.1%"
    # A decimal only below 9.95%, which would be written 10.0%.
    return f"{share:.1%}" if 0 < share < 0.0995 else f"{share:.0%}"


def _scale(size: float) -> tuple[float, str]:
    """The unit for a number of that size: its value and its letter."""
    for minimum, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if size >= minimum:
            return minimum, unit
    return (1e3, "k") if size >= 1e4 else (1.0, "")  # 9,999 is as short as 9.999k
