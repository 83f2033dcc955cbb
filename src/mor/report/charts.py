"""Line and bar charts as self-contained inline SVG, written without a plotting library.

Colors are CSS variables with fallbacks, so that a chart follows the light or dark scheme of the
page around it and still looks right as a file of its own. All sizes are in SVG user units. Why no
library: docs/log.md compares the pages, their sizes and what there would be to install.

A line chart from top to bottom:

    title
    legend                      one row or more
    y label
    ticks of y | plot | last values
                 ticks of x
                 x label
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mor.report.axes import (
    HUGE,
    Axis,
    aligned,
    compact,
    extent,
    linear_axis,
    nice_ticks,
    percent,
    x_axis_of,
)
from mor.report.palette import SERIES_COLORS

CHAR_WIDTH = 6.7
"""Mean width of a character in `FONT`; texts are not measured, only estimated."""
FONT = "font-family='system-ui,-apple-system,Segoe UI,Roboto,sans-serif' font-size='12.5'"
LABEL_GAP = 15.0
"""Least vertical distance between the last values at the right edge."""
TOP_OF_LEGEND = 46.0
"""Baseline of the legend's first row."""
LEGEND_ROW = 20.0
"""Height of a row of the legend."""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart through the points (xs[i], ys[i]) in the given order.

    A point with a value that is not finite (or beyond 1e300) is a gap in the line.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    dashed: bool = False

    def __post_init__(self) -> None:
        assert len(self.xs) == len(self.ys), (self.name, len(self.xs), len(self.ys))


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
    """An SVG element with a line for each series and its last value at the right edge.

    Args:
        log_x: the x axis is logarithmic; points with x <= 0 are gaps.
        y_range: values that the y axis shows; lines are cut off there. None shows all values.
    """
    lines = [_drawable(s, log_x) for s in series]
    points = [point for line in lines for point in line if point is not None]
    legend, top = _legend([(s.name, s.dashed) for s in series], width, bars=False)
    top += 36 if y_label else 14
    bottom = height - (46.0 if x_label else 28.0)
    assert bottom - top >= 40, f"height {height} leaves no room for the plot"

    # The y axis comes first: the width of its ticks' texts decides where the plot begins.
    if y_range is None:
        y_ticks = nice_ticks(*extent([y for _, y in points]), 6, outward=True)
        y_range = y_ticks[0], y_ticks[-1]
    else:
        y_ticks = nice_ticks(*y_range, 5)
    y_axis = linear_axis(y_range, (bottom, top), y_ticks)
    left = 14 + CHAR_WIDTH * max(len(text) for _, text in y_axis.ticks)
    ends = [next((p for p in reversed(line) if p is not None), None) for line in lines]
    values = aligned([p[1] for p in ends if p])
    right = width - 22 - CHAR_WIDTH * max(map(len, values), default=0)
    x_axis = x_axis_of([x for x, _ in points], (left, right), log_x)

    parts = [legend, _grid(x_axis, y_axis, x_label, y_label, upright=True)]
    # A nested SVG cuts off what lies outside of it; 3 units are for half a line's width.
    parts.append(f'<svg x="{left - 3:.1f}" y="{top - 3:.1f}" width="{right - left + 6:.1f}" ')
    parts.append(f'height="{bottom - top + 6:.1f}" overflow="hidden" viewBox="{left - 3:.1f} ')
    parts.append(f'{top - 3:.1f} {right - left + 6:.1f} {bottom - top + 6:.1f}">')
    parts += [_path(s, i, lines[i], x_axis, y_axis) for i, s in enumerate(series)]
    parts.append("</svg>")
    parts.append(_last_values(ends, x_axis, y_axis))
    if not points:
        parts.append(_text((left + right) / 2, (top + bottom) / 2, "no data", "middle", True))
    return _svg(title, _describe(x_label, y_label, series, ends), parts, width, height)


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
    """An SVG element with a group of bars for each category, one bar for each series.

    Args:
        series: names, each with a share from 0 to 1 for each category, which is written as percent;
            a share that is not finite has no bar.
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
    # Percentages stand upright if one of them is wider than a bar.
    flat = CHAR_WIDTH * max((len(percent(share)) for share in shares), default=0) <= bar + 2

    legend, top = _legend([(name, False) for name, _ in series], width, bars=True)
    top += (40 if y_label else 20) + (0 if flat else 22)
    bottom = height - (48.0 if x_label else 30.0)
    assert bottom - top >= 40, f"height {height} leaves no room for the plot"
    y_ticks = tuple(zip(ticks, texts, strict=True))
    y_axis = Axis(ends=(0.0, ticks[-1]), span=(bottom, top), ticks=y_ticks)
    x_axis = Axis(ends=(left, width - 8.0), span=(left, width - 8.0), ticks=middles)
    parts = [legend, _grid(x_axis, y_axis, x_label, y_label, upright=False)]
    for j, (name, values) in enumerate(series):
        for (middle, category), share in zip(middles, values, strict=True):
            x = middle + (j - len(series) / 2) * bar
            parts.append(_bar(x, bar, share, f"{name}, {category}", j, y_axis, flat))
    rows = [f"{name}: " + ", ".join(map(percent, values)) for name, values in series]
    description = f"Shares for {', '.join(categories)}. " + ". ".join(rows)
    return _svg(title, description, parts, width, height)


def series_color(index: int) -> str:
    """The CSS color of a series: the page's variable, or the light scheme's color without it."""
    index %= len(SERIES_COLORS)
    return f"var(--series-{index},{SERIES_COLORS[index].light})"


def _drawable(series: Series, log_x: bool) -> list[Point | None]:
    """The points of a series, None for each that is a gap."""

    def is_drawable(x: float, y: float) -> bool:
        return abs(x) < HUGE and abs(y) < HUGE and (x > 0 or not log_x)

    pairs = zip(series.xs, series.ys, strict=True)
    return [(float(x), float(y)) if is_drawable(x, y) else None for x, y in pairs]


def _text(x: float, y: float, text: str, anchor: str = "start", muted: bool = False) -> str:
    """A text whose baseline is at y; `anchor` says which end of it is at x."""
    fade = ' fill-opacity="0.68"' if muted else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{fade}>{_escape(text)}</text>'


def _escape(text: str) -> str:
    """Text for XML: blanks for control characters and lone surrogates, which XML cannot hold."""
    return escape("".join(c if c.isprintable() else " " for c in text))


def _rule(x1: float, y1: float, x2: float, y2: float, strength: float) -> str:
    """A thin straight line in the text's color; `strength` is its opacity."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="currentColor" stroke-opacity="{strength}"/>'


def _stroke(index: int, dashed: bool) -> str:
    """SVG attributes of the line of a series; one that has to reuse a color is dotted."""
    dots = "7 5" if dashed else "none"
    if index >= len(SERIES_COLORS) and not dashed:
        dots = "1.5 4"
    return (
        f'style="stroke:{series_color(index)}" fill="none" stroke-width="2" '
        f'stroke-linejoin="round" stroke-linecap="round" stroke-dasharray="{dots}"'
    )


def _legend(names: Sequence[tuple[str, bool]], width: int, *, bars: bool) -> tuple[str, float]:
    """The legend in as many rows as it needs, and the y below it.

    Args:
        names: of the series, each with whether its line is dashed.
        bars: show squares instead of lines.
    """
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


def _grid(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str, *, upright: bool) -> str:
    """Grid lines, tick texts and labels of both axes; vertical lines only if `upright`."""
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


def _path(series: Series, index: int, points: Sequence[Point | None], x: Axis, y: Axis) -> str:
    """The SVG path of a series; a point between two gaps becomes a dot."""
    steps: list[str] = []
    pen_down = False
    for i, point in enumerate(points):
        if point is None:
            pen_down = False
            continue
        place = f"{x.place(point[0]):.1f} {y.place(point[1]):.1f}"
        alone = not pen_down and (i + 1 == len(points) or points[i + 1] is None)
        # "h0" draws nothing but the round ends of the line.
        steps.append(("L" if pen_down else "M") + place + ("h0" if alone else ""))
        pen_down = True
    name = f"<title>{_escape(series.name)}</title>"
    return f'<path d="{"".join(steps)}" {_stroke(index, series.dashed)}>{name}</path>'


def _last_values(ends: Sequence[Point | None], x_axis: Axis, y_axis: Axis) -> str:
    """A dot at the end of each line and its value at the right edge; none if there is no room.

    Args:
        ends: the last point of each series, None if it has none.
    """
    right, (bottom, top) = x_axis.span[1], y_axis.span
    drawn = [(i, end) for i, end in enumerate(ends) if end]
    texts = aligned([end[1] for _, end in drawn])
    marks = sorted(
        (y_axis.place(end[1]), i, x_axis.place(end[0]), text)
        for (i, end), text in zip(drawn, texts, strict=True)
        if y_axis.ends[0] <= end[1] <= y_axis.ends[1]
    )
    if len(marks) * LABEL_GAP > bottom - top:
        return ""
    # Downwards each value is moved below the one before, then upwards back into the plot.
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


def _bar(
    x: float, width: float, share: float, name: str, index: int, y_axis: Axis, flat: bool
) -> str:
    """One bar with its percentage above it, which is turned by 90 degrees unless `flat`."""
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
    """A line chart in words, for readers who hear the page: the last point of each line."""
    parts = [f"{y} against {x}."]
    for line, end in zip(series, ends, strict=True):
        last = f"ends at {compact(end[1])} ({x} {compact(end[0])})" if end else "no data"
        parts.append(f"{line.name}: {last}.")
    return " ".join(parts)


def _svg(title: str, description: str, parts: Sequence[str], width: int, height: int) -> str:
    """The SVG element around the parts of a chart."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" {size} '
        f'aria-label="{_escape(title)}" fill="currentColor" {FONT}>'
        f"<title>{_escape(title)}</title><desc>{_escape(description)}</desc>"
        f'<text x="0" y="18" font-size="15" font-weight="600">{_escape(title)}</text>'
        + "".join(parts)
        + "</svg>"
    )
