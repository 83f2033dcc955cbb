"""Line and bar charts as self-contained inline SVG, written without a plotting library.

Colors are CSS variables with fallbacks, so that a chart follows the light or dark scheme of the
page around it and still looks right as a file of its own. All sizes are in SVG user units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from mor.report.palette import SERIES_SHADES

CHAR_WIDTH = 6.7
FONT = "font-family='system-ui,-apple-system,Segoe UI,Roboto,sans-serif' font-size='12.5'"
LABEL_GAP = 15.0
TOP_OF_LEGEND = 46.0
LEGEND_ROW = 20.0
HUGE = 1e300

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart: `ys[i]` at `xs[i]`, drawn in the given order.

    A point where either value is not finite (or beyond 1e300) is a gap in the line.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    dashed: bool = False

    def __post_init__(self) -> None:
        assert len(self.xs) == len(self.ys), (self.name, len(self.xs), len(self.ys))


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """A mapping from data (`ends`) to user units (`span`), and its ticks: value and text."""

    ends: tuple[float, float]
    span: tuple[float, float]
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def place(self, value: float) -> float:
        """The position of a finite data value (positive if the axis is logarithmic)."""
        low, high = self.ends
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.span[0] + (value - low) / (high - low) * (self.span[1] - self.span[0])


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    width: int = 720,
    height: int = 320,
    log_x: bool = False,
    y_range: tuple[float, float] | None = None,
) -> str:
    """An SVG element with one line per series and the last value of each at the right edge.

    Points that are not finite, and points with x <= 0 where `log_x`, are gaps. `y_range` fixes the
    range shown (lines are clipped to it); without it the range follows the data.
    """
    lines = [_drawable(s, log_x) for s in series]
    points = [point for line in lines for point in line if point is not None]
    legend, top = _legend([(s.name, s.dashed) for s in series], width, bars=False)
    top += 36 if y_label else 14
    bottom = height - (46.0 if x_label else 28.0)
    assert bottom - top >= 40, f"height {height} leaves no room for the plot"

    if y_range is None:
        y_ticks = nice_ticks(*_extent([y for _, y in points]), 6, outward=True)
        y_range = y_ticks[0], y_ticks[-1]
    else:
        y_ticks = nice_ticks(*y_range, 5)
    y_axis = _linear(y_range, (bottom, top), y_ticks)
    left = 14 + CHAR_WIDTH * max(len(text) for _, text in y_axis.ticks)
    ends = [next((p for p in reversed(line) if p is not None), None) for line in lines]
    values = _aligned([p[1] for p in ends if p])
    right = width - 22 - CHAR_WIDTH * max(map(len, values), default=0)
    x_axis = _horizontal([x for x, _ in points], (left, right), log_x)

    parts = [legend, _grid(x_axis, y_axis, x_label, y_label, upright=True)]
    parts.append(f'<svg x="{left - 3:.1f}" y="{top - 3:.1f}" width="{right - left + 6:.1f}" ')
    parts.append(f'height="{bottom - top + 6:.1f}" overflow="hidden" viewBox="{left - 3:.1f} ')
    parts.append(f'{top - 3:.1f} {right - left + 6:.1f} {bottom - top + 6:.1f}">')
    parts += [_path(s, i, lines[i], x_axis, y_axis) for i, s in enumerate(series)]
    parts.append("</svg>")
    parts.append(_last_values(ends, x_axis, y_axis))
    if not points:
        parts.append(_text((left + right) / 2, (top + bottom) / 2, "no data", "middle", True))
    return _document(title, _describe(x_label, y_label, series, ends), parts, width, height)


def bar_chart(
    title: str,
    categories: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    *,
    x_label: str = "",
    y_label: str = "",
    width: int = 720,
    height: int = 320,
) -> str:
    """An SVG element with one group of bars per category: shares (0..1), printed as percent.

    Each series is a name and one share per category; a share that is not finite has no bar.
    """
    for name, shares in series:
        assert len(shares) == len(categories), (name, len(shares), len(categories))
        assert not any(share < 0 for share in shares), (name, shares)
    shares = [share for _, values in series for share in values if math.isfinite(share)]
    ticks = nice_ticks(0.0, max(shares, default=0.0) or 1.0, 4, outward=True)
    texts = [f"{tick * 100:.4g}%" for tick in ticks]
    left = 14 + CHAR_WIDTH * max(len(text) for text in texts)
    group = (width - 8 - left) / max(1, len(categories))
    middles = tuple((left + group * (i + 0.5), text) for i, text in enumerate(categories))
    bar = min(56.0, group * 0.8 / max(1, len(series)))
    flat = CHAR_WIDTH * max((len(percent(share)) for share in shares), default=0) <= bar + 2

    legend, top = _legend([(name, False) for name, _ in series], width, bars=True)
    top += (40 if y_label else 20) + (0 if flat else 22)
    bottom = height - (48.0 if x_label else 30.0)
    assert bottom - top >= 40, f"height {height} leaves no room for the plot"
    y_ticks = tuple(zip(ticks, texts, strict=True))
    y_axis = _Axis(ends=(0.0, ticks[-1]), span=(bottom, top), ticks=y_ticks)
    x_axis = _Axis(ends=(left, width - 8.0), span=(left, width - 8.0), ticks=middles)
    parts = [legend, _grid(x_axis, y_axis, x_label, y_label, upright=False)]
    for j, (name, values) in enumerate(series):
        for (middle, category), share in zip(middles, values, strict=True):
            x = middle + (j - len(series) / 2) * bar
            parts.append(_bar(x, bar, share, f"{name}, {category}", j, y_axis, flat))
    rows = [f"{name}: " + ", ".join(map(percent, values)) for name, values in series]
    description = f"Shares for {', '.join(categories)}. " + ". ".join(rows)
    return _document(title, description, parts, width, height)


def nice_ticks(low: float, high: float, target: int, *, outward: bool = False) -> tuple[float, ...]:
    """About `target` round numbers, 1, 2, 2.5 or 5 times a power of ten apart.

    They lie within [low, high], or where `outward` they reach just far enough to enclose it.
    """
    assert low < high, (low, high)
    rough = (high - low) / target
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 2.5, 5, 10, 20) if m * power >= rough * 0.999)
    first, last = low / step, high / step
    if outward:
        first, last = math.floor(first + 1e-6), math.ceil(last - 1e-6)
    else:
        first, last = math.ceil(first - 1e-6), math.floor(last + 1e-6)
    return tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))


def compact(value: float) -> str:
    """A number of about four digits with k, M, B or T for large values: 1.44M, 4.711, 0."""
    value = float(f"{value:.4g}")
    size = abs(value)
    if size < 1e4 or size >= 1e15:
        return f"{value:.4g}"
    scale, unit = _scale(size)
    return f"{value / scale:.4g}{unit}"


def percent(share: float) -> str:
    """A share as percent: 52%, 4.3%, <0.1%, and a dash where there is no finite share."""
    if not math.isfinite(share):
        return "\N{EN DASH}"
    if 0 < share < 0.001:
        return "<0.1%"
    return f"{share:.1%}" if 0 < share < 0.0995 else f"{share:.0%}"


def series_color(index: int) -> str:
    """The CSS color of series `index`: a page variable with the light shade as its fallback."""
    index %= len(SERIES_SHADES)
    return f"var(--series-{index},{SERIES_SHADES[index].light})"


def _scale(size: float) -> tuple[float, str]:
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k"))
    unit = next((u for u in units if size >= u[0]), (1.0, ""))
    return (1e3, "k") if unit[1] == "k" else unit


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """One text per tick, all with the same unit and the same number of decimals."""
    size = max((abs(tick) for tick in ticks), default=0.0)
    if size >= 1e15 or (0 < size < 1e-3):
        return [f"{tick:.3g}" for tick in ticks]
    scale, unit = _scale(size)
    step = min((b - a for a, b in pairwise(ticks)), default=size or 1.0) / scale
    decimals = next((d for d in range(9) if abs(round(step, d) - step) < 1e-6 * step), 9)
    return [f"{t / scale:.{decimals}f}{unit}" if t else "0" for t in ticks]


def _extent(values: Sequence[float], *, log: bool = False) -> tuple[float, float]:
    """Least and greatest value, moved apart where they are one; 1..10 where there are none."""
    if not values:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if high - low > max(1e-9 * max(abs(low), abs(high)), 1 / HUGE):
        return low, high
    margin = 0.1 * abs(low) or 0.5
    return low - margin, high + margin


def _linear(ends: tuple[float, float], span: tuple[float, float], ticks: Sequence[float]) -> _Axis:
    return _Axis(ends=ends, span=span, ticks=tuple(zip(ticks, _tick_texts(ticks), strict=True)))


def _horizontal(values: Sequence[float], span: tuple[float, float], log: bool) -> _Axis:
    """An x axis; if logarithmic, ticks are powers of ten, or 1-2-5, or round numbers."""
    low, high = _extent(values, log=log)
    if not log:
        low = 0.0 if 0 < low < 0.1 * high else low
        target = max(3, int(span[1] - span[0]) // 90)
        return _linear((low, high), span, nice_ticks(low, high, target))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = [10.0**p for p in powers[:: -(-len(powers) // 9)]]
    finer = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    ticks: list[float] = []
    for candidates in (decades, finer, nice_ticks(low, high, 4)):
        ticks = [t for t in candidates if low * 0.999999 <= t <= high * 1.000001]
        if len(ticks) >= 3:
            break
    texts = tuple((tick, compact(tick)) for tick in ticks)
    return _Axis(ends=(low, high), span=span, ticks=texts, log=True)


def _drawable(series: Series, log_x: bool) -> list[Point | None]:
    """The points of a series, None for each one that cannot be drawn."""

    def visible(x: float, y: float) -> bool:
        return abs(x) < HUGE and abs(y) < HUGE and (x > 0 or not log_x)

    pairs = zip(series.xs, series.ys, strict=True)
    return [(float(x), float(y)) if visible(x, y) else None for x, y in pairs]


def _text(x: float, y: float, text: str, anchor: str = "start", muted: bool = False) -> str:
    fade = ' fill-opacity="0.68"' if muted else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{fade}>{_escape(text)}</text>'


def _escape(text: str) -> str:
    """Text that is safe inside XML, where control characters and lone surrogates may not appear."""
    return escape("".join(c if c.isprintable() else " " for c in text))


def _rule(x1: float, y1: float, x2: float, y2: float, strength: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="currentColor" stroke-opacity="{strength}"/>'


def _stroke(index: int, dashed: bool) -> str:
    """Presentation of line `index`; lines that have to reuse a color are dotted."""
    dots = "7 5" if dashed else "1.5 4" if index >= len(SERIES_SHADES) else "none"
    return (
        f'style="stroke:{series_color(index)}" fill="none" stroke-width="2" '
        f'stroke-linejoin="round" stroke-linecap="round" stroke-dasharray="{dots}"'
    )


def _legend(names: Sequence[tuple[str, bool]], width: int, *, bars: bool) -> tuple[str, float]:
    """Swatches with names in as many rows as they need, and the y below them."""
    parts: list[str] = []
    x, y = 0.0, TOP_OF_LEGEND
    for i, (name, dashed) in enumerate(names):
        needed = 32 + CHAR_WIDTH * len(name)
        if x and x + needed > width:
            x, y = 0.0, y + LEGEND_ROW
        if bars:
            box = f'x="{x:.1f}" y="{y - 10:.1f}" width="12" height="12" rx="2"'
            parts.append(f'<rect {box} style="fill:{series_color(i)}"/>')
        else:
            parts.append(f'<path d="M{x + 1:.1f} {y - 4:.1f}h18" {_stroke(i, dashed)}/>')
        parts.append(_text(x + (18 if bars else 26), y, name))
        x += needed + 16
    return "".join(parts), y + 4 if names else TOP_OF_LEGEND - LEGEND_ROW + 4


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str, *, upright: bool) -> str:
    """Horizontal (and where `upright` vertical) grid lines, tick texts and axis labels."""
    (left, right), (bottom, top) = x_axis.span, y_axis.span
    parts = [_text(0, top - 14, y_label, muted=True)] if y_label else []
    for value, text in y_axis.ticks:
        y = y_axis.place(value)
        parts.append(_rule(left, y, right, y, 0.13))
        parts.append(_text(left - 8, y + 4, text, "end", muted=True))
    for value, text in x_axis.ticks:
        x = x_axis.place(value)
        if upright:
            parts.append(_rule(x, top, x, bottom, 0.06))
        parts.append(_text(x, bottom + 19, text, "middle", muted=upright))
    parts.append(_rule(left, bottom, right, bottom, 0.5))
    if x_label:
        parts.append(_text((left + right) / 2, bottom + 39, x_label, "middle", muted=True))
    return "".join(parts)


def _path(series: Series, index: int, points: Sequence[Point | None], x: _Axis, y: _Axis) -> str:
    """One line; a point alone between two gaps becomes a dot."""
    steps: list[str] = []
    pen_down = False
    for i, point in enumerate(points):
        if point is None:
            pen_down = False
            continue
        place = f"{x.place(point[0]):.1f} {y.place(point[1]):.1f}"
        alone = not pen_down and (i + 1 == len(points) or points[i + 1] is None)
        steps.append(("L" if pen_down else "M") + place + ("h0" if alone else ""))
        pen_down = True
    name = f"<title>{_escape(series.name)}</title>"
    return f'<path d="{"".join(steps)}" {_stroke(index, series.dashed)}>{name}</path>'


def _last_values(ends: Sequence[Point | None], x_axis: _Axis, y_axis: _Axis) -> str:
    """A dot at the end of each line and its value at the right edge, moved apart if need be."""
    right, (bottom, top) = x_axis.span[1], y_axis.span
    drawn = [(i, end) for i, end in enumerate(ends) if end]
    texts = _aligned([end[1] for _, end in drawn])
    marks = sorted(
        (y_axis.place(end[1]), i, x_axis.place(end[0]), text)
        for (i, end), text in zip(drawn, texts, strict=True)
        if y_axis.ends[0] <= end[1] <= y_axis.ends[1]
    )
    if len(marks) * LABEL_GAP > bottom - top:
        return ""
    heights: list[float] = []
    for y, *_ in marks:
        heights.append(max(y, heights[-1] + LABEL_GAP) if heights else y)
    limit = bottom
    for j in reversed(range(len(heights))):
        heights[j] = limit = min(heights[j], limit)
        limit -= LABEL_GAP
    parts: list[str] = []
    for (y, i, x, text), height in zip(marks, heights, strict=True):
        if x < right - 6:
            parts.append(_rule(x + 6, y, right, y, 0.25).replace("/>", ' stroke-dasharray="2 3"/>'))
        color = series_color(i)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" style="fill:{color}"/>')
        fill = f'style="fill:color-mix(in srgb,{color} 75%,currentColor)" font-weight="600"'
        parts.append(f'<text x="{right + 10:.1f}" y="{height + 4:.1f}" {fill}>{text}</text>')
    return "".join(parts)


def _aligned(values: Sequence[float]) -> list[str]:
    """`compact` texts, all with the decimals of the longest where none has a unit or exponent."""
    texts = [compact(value) for value in values]
    if not all(text.replace(".", "").lstrip("-").isdigit() for text in texts):
        return texts
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    return [f"{value:.{decimals}f}" for value in values]


def _bar(
    x: float, width: float, share: float, name: str, index: int, y_axis: _Axis, flat: bool
) -> str:
    """One bar with its percentage above it, which stands upright unless `flat`."""
    base, text = y_axis.span[0], percent(share)
    y = y_axis.place(share) if math.isfinite(share) else base
    middle = x + width / 2
    box = f'x="{x + 1:.1f}" y="{y:.1f}" width="{max(1.0, width - 2):.1f}" height="{base - y:.1f}"'
    label = _text(middle, y - 6, text, "middle")
    if not flat:
        turn = f'<text transform="rotate(-90 {middle + 4:.1f} {y - 6:.1f})"'
        label = _text(middle + 4, y - 6, text).replace("<text", turn)
    hover = f"<title>{_escape(f'{name}: {text}')}</title>"
    return f'<rect {box} rx="1.5" style="fill:{series_color(index)}">{hover}</rect>{label}'


def _describe(x: str, y: str, series: Sequence[Series], ends: Sequence[Point | None]) -> str:
    parts = [f"{y} against {x}."]
    for line, end in zip(series, ends, strict=True):
        last = f"ends at {compact(end[1])} ({x} {compact(end[0])})" if end else "no data"
        parts.append(f"{line.name}: {last}.")
    return " ".join(parts)


def _document(title: str, description: str, parts: Sequence[str], width: int, height: int) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" {size} '
        f'aria-label="{_escape(title)}" fill="currentColor" {FONT}>'
        f"<title>{_escape(title)}</title><desc>{_escape(description)}</desc>"
        f'<text x="0" y="18" font-size="15" font-weight="600">{_escape(title)}</text>'
        + "".join(parts)
        + "</svg>"
    )
