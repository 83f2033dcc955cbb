"""The HTML reports: well-formed, harmless with hostile text, and true to the numbers."""

import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from mor.report.charts import compact, nice_ticks, percent
from mor.report.html import ColoredText, Section, Series, Table, bar_chart, line_chart, page
from mor.report.palette import DARK_INK, DEPTH_COLORS, LIGHT_INK, SERIES_COLORS, depth_color_index

DASH = "\N{EN DASH}"
HOSTILE = '<script>alert("&")</script>\' --> </style> \x1b[2J'
VOID = {"meta", "link", "input", "br", "hr", "img"}
SVG = "{http://www.w3.org/2000/svg}"


class Reader(HTMLParser):
    """Checks that tags nest and keeps every element with the text inside it."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {[self.elements[i] for i in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"attribute given twice: {tag} {attrs}"
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.elements[self.open.pop()][0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for i in self.open:
            self.texts[i] += data

    def having(self, name: str, value: str | None = None) -> list[tuple[str, dict, str]]:
        return [
            (tag, attrs, text)
            for (tag, attrs), text in zip(self.elements, self.texts, strict=True)
            if name in attrs and value in (None, attrs[name])
        ]

    def tags(self, name: str) -> list[str]:
        pairs = zip(self.elements, self.texts, strict=True)
        return [text for (tag, _), text in pairs if tag == name]


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
        assert Reader(svg).elements[0][1]["aria-label"] == title.text


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


def test_table_escapes_and_aligns() -> None:
    rows = [["loss", "4.71", HOSTILE], ["gap", DASH, "1"]]
    html = Table(columns=["", "MoR", "<b>"], rows=rows, caption=HOSTILE).html()
    reader = Reader(html)
    assert reader.tags("caption") == [HOSTILE]
    assert reader.tags("td") == ["4.71", HOSTILE, DASH, "1"]
    assert reader.tags("th") == ["", "MoR", "<b>", "loss", "gap"]
    assert [text for _, _, text in reader.having("class", "number")] == ["MoR", "4.71", DASH]
    assert not reader.tags("script")
    Reader(Table(columns=[], rows=[]).html())
    with pytest.raises(AssertionError):
        Table(columns=["a", "b"], rows=[["1"]])


PIECES = ("def", " f(x", "):\r\n", "\n\t  ", HOSTILE, "", "&amp;", " \u202e", "é→🙂", "  ")
COUNTS = (1, 2, 3, 3, 2, 1, 1, 2, 3, 1)


def test_colored_text_keeps_every_character() -> None:
    html = ColoredText(pieces=PIECES, counts=COUNTS, num_recursions=3, prompt_tokens=2).html()
    reader = Reader(html)
    assert "\r" not in html, "an HTML parser would turn a bare carriage return into a newline"
    tokens = reader.having("data-n")
    assert [text for _, _, text in tokens] == list(PIECES)
    ((_, _, text),) = reader.having("class", "tokens")
    assert text == "".join(PIECES)
    assert [attrs["title"] for _, attrs, _ in tokens] == [f"recursions: {n} of 3" for n in COUNTS]
    assert [attrs["data-n"] for _, attrs, _ in tokens] == [str(n) for n in COUNTS]
    classes = [attrs["class"].split()[0] for _, attrs, _ in tokens]
    assert dict(zip(COUNTS, classes, strict=True)) == {1: "d0", 2: "d4", 3: "d7"}
    assert [i for i, (_, a, _) in enumerate(tokens) if "newline" in a["class"]] == [2, 3]


def test_prompt_is_marked_and_left_out_of_the_shares() -> None:
    text = ColoredText(
        pieces="abcdef", counts=[3, 3, 1, 1, 1, 2], num_recursions=3, prompt_tokens=2
    )
    reader = Reader(text.html())
    assert [inner for _, _, inner in reader.having("class", "prompt")] == ["prompt", "ab"]
    legend = reader.having("class", "legend")[0][2]
    assert "1 75%" in legend
    assert "2 25%" in legend
    assert "3 0%" in legend
    assert "mean 1.25 of 3" in legend
    rare = ColoredText(pieces="a" * 2000, counts=[2] + [1] * 1999, num_recursions=2).html()
    assert "2 <0.1%" in Reader(rare).having("class", "legend")[0][2]
    assert "<0" not in rare
    bare = ColoredText(pieces="ab", counts=[1, 2], num_recursions=2).html()
    assert "prompt" not in bare


@pytest.mark.parametrize("num_recursions", range(1, 9))
def test_every_count_has_its_own_shade(num_recursions: int) -> None:
    shades = [depth_color_index(n, num_recursions) for n in range(1, num_recursions + 1)]
    assert shades == sorted(set(shades))
    assert shades[0] == 0
    assert num_recursions == 1 or shades[-1] == len(DEPTH_COLORS) - 1
    counts = range(1, num_recursions + 1)
    text = ColoredText(pieces="x" * num_recursions, counts=counts, num_recursions=num_recursions)
    assert len(Reader(text.html()).having("data-n")) == num_recursions


def test_impossible_counts_are_refused() -> None:
    for count in (0, 4, -1):
        with pytest.raises(AssertionError):
            ColoredText(pieces=["a"], counts=[count], num_recursions=3)
    with pytest.raises(AssertionError):
        ColoredText(pieces=["a", "b"], counts=[1], num_recursions=3)
    with pytest.raises(AssertionError):
        ColoredText(pieces=["a"], counts=[1], num_recursions=3, prompt_tokens=2)
    with pytest.raises(AssertionError):
        depth_color_index(1, 9)
    Reader(ColoredText(pieces=[], counts=[], num_recursions=3).html())


def sample_page() -> str:
    line = Series(name="MoR", xs=range(300), ys=[10 / (1 + i / 50) for i in range(300)])
    charts = line_chart("Loss", "tokens", "nats", [line]) + bar_chart("Depth", ["1"], [("a", [1])])
    table = Table(columns=["what", "MoR"], rows=[["loss", "4.71"]]).html()
    text = ColoredText(pieces=PIECES, counts=COUNTS, num_recursions=3, prompt_tokens=2).html()
    sections = [
        Section(heading=HOSTILE, body_html=charts, note=HOSTILE),
        Section(heading="Text", body_html=table + text),
    ]
    return page(HOSTILE, HOSTILE, sections, HOSTILE)


def test_page_is_well_formed_and_harmless() -> None:
    html = sample_page()
    reader = Reader(html)
    for tag in ("h1", "footer"):
        assert reader.tags(tag) == [HOSTILE]
    assert reader.tags("h2") == [HOSTILE, "Text"]
    assert reader.tags("title")[0] == HOSTILE
    assert [text for _, _, text in reader.having("class", "note")] == [HOSTILE]
    assert not reader.tags("script")
    assert html.startswith("<!DOCTYPE html>")
    assert len(reader.tags("style")) == 1
    assert html == sample_page()


def test_page_asks_no_other_host() -> None:
    html = sample_page()
    assert not re.search(r"(?i)https?:|//\w|@import|url\(", html.replace(SVG.strip("{}"), ""))
    policy = Reader(html).having("http-equiv", "Content-Security-Policy")
    assert policy[0][1]["content"].startswith("default-src 'none';")
    links = [attrs for _, attrs, _ in Reader(html).having("href")]
    assert [attrs["href"] for attrs in links] == ["data:,"]
    assert not Reader(html).having("src")


def test_page_defines_every_variable_and_class_that_it_uses() -> None:
    html = sample_page()
    light, dark = html.split("prefers-color-scheme:dark", 1)
    used = set(re.findall(r"var\((--[\w-]+)", html)) - {"--shade"}
    for scheme in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+):#", scheme))
    for shade in DEPTH_COLORS + SERIES_COLORS:
        assert f":{shade.light};" in light
        assert f":{shade.dark};" in dark
    style = Reader(html).tags("style")[0]
    for i in range(len(DEPTH_COLORS)):
        assert f".d{i}{{" in style
    assert "@media print" in style
    assert "white-space:pre-wrap" in style
    assert style.count("{") == style.count("}")


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_palette_is_readable_and_ordered_without_hue() -> None:
    assert all(contrast(shade.light, LIGHT_INK) >= 4.5 for shade in DEPTH_COLORS)
    assert all(contrast(shade.dark, DARK_INK) >= 4.5 for shade in DEPTH_COLORS)
    light = [luminance(shade.light) for shade in DEPTH_COLORS]
    dark = [luminance(shade.dark) for shade in DEPTH_COLORS]
    assert light == sorted(light, reverse=True)
    assert dark == sorted(dark)
    assert all(contrast(shade.light, "#fdfdfb") >= 3 for shade in SERIES_COLORS)
    assert all(contrast(shade.dark, "#15171b") >= 3 for shade in SERIES_COLORS)
