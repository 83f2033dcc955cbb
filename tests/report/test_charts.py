"""Charts: data where the ticks say, gaps, labels that do not overlap, and hostile texts."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from html_reader import HOSTILE, HTMLReader

from mor.report.charts import Series, bar_chart, line_chart

DASH = "\N{EN DASH}"
SVG = "{http://www.w3.org/2000/svg}"


def parse(svg: str) -> ElementTree.Element:
    assert not re.search(r"\b(nan|inf)\b", svg), "a coordinate is not a number"
    return ElementTree.fromstring(svg)


def plot_paths(root: ElementTree.Element) -> list[str]:
    inner = root.find(f"{SVG}svg")
    assert inner is not None
    return [path.attrib["d"] for path in inner.findall(f"{SVG}path")]


def vertices(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+?) ([-\d.]+)", path)]


def ticks(root: ElementTree.Element, anchor: str) -> list[tuple[float, float]]:
    """(position, value) of the plain numbers beside (anchor end) or below (middle) the plot."""
    axis = "y" if anchor == "end" else "x"
    found = [t for t in root.findall(f"{SVG}text") if t.attrib.get("text-anchor") == anchor]
    numbers = [t for t in found if re.fullmatch(r"-?[\d.]+", t.text or "")]
    return [(float(t.attrib[axis]), float(t.text or "")) for t in numbers]


def read_off(place: float, scale: Sequence[tuple[float, float]]) -> float:
    (a, low), (b, high) = scale[0], scale[-1]
    return low + (place - a) / (b - a) * (high - low)


def test_line_chart_draws_the_data_where_its_ticks_say() -> None:
    xs, ys = [1.0, 20.0, 35.0, 60.0], [10.4, 7.25, 5.5, 4.75]
    root = parse(line_chart("t", "step", "loss", [Series(name="a", xs=xs, ys=ys)]))
    (path,) = plot_paths(root)
    across, up = ticks(root, "middle"), [(y - 4, v) for y, v in ticks(root, "end")]
    assert len(across) >= 3
    assert len(up) >= 3
    drawn = [(read_off(x, across), read_off(y, up)) for x, y in vertices(path)]
    assert [x for x, _ in drawn] == pytest.approx(xs, abs=0.05)
    assert [y for _, y in drawn] == pytest.approx(ys, abs=0.05)


def test_points_that_are_not_finite_are_gaps() -> None:
    nan, inf = math.nan, math.inf
    ys = [3.0, 2.0, nan, 2.5, inf, 2.0, 1.0, 1.5, -inf]
    root = parse(line_chart("t", "x", "y", [Series(name="a", xs=range(9), ys=ys)]))
    (path,) = plot_paths(root)
    assert path.count("M") == 3
    assert path.count("L") == 3
    assert path.count("h0") == 1, "the lone point between two gaps must be visible"
    labels = [t.text for t in root.iter(f"{SVG}text") if t.attrib.get("font-weight") == "600"]
    assert labels == ["t", "1.5"], "the label gives the last finite value"


@pytest.mark.parametrize(
    "ys", [[], [5e-5], [0.0], [math.nan], [2.0, 2.0, 2.0], [1e308, -1e308], [0.0, 5e-324], [3e38]]
)
@pytest.mark.parametrize("log_x", [False, True])
def test_line_chart_survives_poor_data(ys: list[float], log_x: bool) -> None:
    series = Series(name="a", xs=range(1, len(ys) + 1), ys=ys)
    root = parse(line_chart("t", "x", "y", [series], log_x=log_x))
    drawable = any(abs(y) < 1e300 for y in ys)
    assert ("no data" in [t.text for t in root.iter(f"{SVG}text")]) is not drawable
    assert bool(plot_paths(root)[0]) is drawable
    assert parse(line_chart("t", "", "", [], log_x=log_x)).attrib["viewBox"] == "0 0 720 320"


def test_log_axis_spaces_decades_evenly_and_drops_what_has_no_logarithm() -> None:
    xs = [-1.0, 0.0, 1.0, 10.0, 100.0, 1000.0]
    root = parse(line_chart("t", "x", "y", [Series(name="a", xs=xs, ys=xs)], log_x=True))
    places = [x for x, _ in vertices(plot_paths(root)[0])]
    gaps = [b - a for a, b in pairwise(places)]
    assert len(gaps) == 3
    assert gaps == pytest.approx([gaps[0]] * 3, abs=0.2)
    assert [value for _, value in ticks(root, "middle")] == [1, 10, 100, 1000]


def test_y_range_clips_instead_of_stretching() -> None:
    line = Series(name="a", xs=[0, 1, 2], ys=[100.0, 5.0, 4.0])
    root = parse(line_chart("t", "x", "y", [line], y_range=(4.0, 7.0)))
    values = [value for _, value in ticks(root, "end")]
    assert (min(values), max(values)) == (4.0, 7.0)
    inner = root.find(f"{SVG}svg")
    assert inner is not None
    assert inner.attrib["overflow"] == "hidden"
    with pytest.raises(AssertionError):
        line_chart("t", "x", "y", [line], y_range=(7.0, 4.0))


@pytest.mark.parametrize(("start", "end"), [(9.0, 4.0), (4.0, 8.95)])
def test_value_labels_of_close_lines_do_not_overlap(start: float, end: float) -> None:
    ends = [end + i * 0.01 for i in range(6)]
    lines = [Series(name=str(y), xs=[0, 1], ys=[start, y]) for y in ends]
    root = parse(line_chart("t", "x", "y", lines))
    bold = [t for t in root.findall(f"{SVG}text") if t.attrib.get("font-weight") == "600"][1:]
    heights = [float(t.attrib["y"]) for t in bold]
    assert [t.text for t in bold] == [f"{y:.2f}" for y in reversed(ends)]
    assert all(b - a >= 14 for a, b in pairwise(heights))
    scale = [y for y, _ in ticks(root, "end")]
    assert min(scale) - 1 <= heights[0] <= heights[-1] <= max(scale) + 1


def test_dashes_and_colors_tell_series_apart() -> None:
    lines = [Series(name=str(i), xs=[0, 1], ys=[i, i], dashed=i == 1) for i in range(8)]
    inner = parse(line_chart("t", "x", "y", lines)).find(f"{SVG}svg")
    assert inner is not None
    looks = [(p.attrib["style"], p.attrib["stroke-dasharray"]) for p in inner]
    assert len(set(looks)) == 8
    assert [dashes != "none" for _, dashes in looks[:3]] == [False, True, False]


def test_hostile_text_in_charts_stays_text() -> None:
    line = line_chart(HOSTILE, HOSTILE, HOSTILE, [Series(name=HOSTILE, xs=[1], ys=[1])])
    bars = bar_chart(HOSTILE, [HOSTILE], [(HOSTILE, [0.5])], x_label=HOSTILE, y_label=HOSTILE)
    for svg in (line, bars):
        root = parse(svg)
        assert "<script" not in svg
        title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
        assert title is not None
        assert title.text == HOSTILE.replace("\x1b", " ")
        assert description is not None
        assert description.text
        assert HTMLReader(svg).elements[0][1]["aria-label"] == title.text


def test_bars_are_as_high_as_their_shares() -> None:
    shares = [("MoR", [0.48, 0.23, 0.29]), ("random", [math.nan, 0.0005, 0.0])]
    root = parse(bar_chart("t", ["1", "2", "3"], shares))
    bars = [r for r in root.iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert heights[1] / heights[0] == pytest.approx(0.23 / 0.48, abs=0.01)
    assert heights[2] / heights[0] == pytest.approx(0.29 / 0.48, abs=0.01)
    assert heights[3] == heights[5] == 0
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert {"48%", "23%", "29%", "<0.1%", DASH} <= set(texts)


def test_bar_labels_stand_upright_where_bars_are_narrow() -> None:
    def turned(models: int) -> bool:
        series = [(str(i), [0.5] * 8) for i in range(models)]
        return "rotate(" in bar_chart("t", list("12345678"), series)

    assert not turned(1)
    assert turned(6)


def test_bar_chart_refuses_ragged_and_negative_shares() -> None:
    with pytest.raises(AssertionError):
        bar_chart("t", ["1", "2"], [("a", [0.5])])
    with pytest.raises(AssertionError):
        bar_chart("t", ["1"], [("a", [-0.5])])
    with pytest.raises(AssertionError):
        Series(name="a", xs=[1, 2], ys=[1])
    assert "<rect" not in bar_chart("t", [], [])
