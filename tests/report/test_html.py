"""HTML of the reports: well-formed, harmless with hostile text, and true to the numbers."""

import re

import pytest
from html_reader import HOSTILE, HTMLReader

from mor.report.html import ColoredText, Section, Series, Table, bar_chart, line_chart, page
from mor.report.palette import DEPTH_COLORS, SERIES_COLORS, depth_color_index

DASH = "\N{EN DASH}"
SVG = "{http://www.w3.org/2000/svg}"

PIECES = ("def", " f(x", "):\r\n", "\n\t  ", HOSTILE, "", "&amp;", " \u202e", "é→🙂", "  ")
COUNTS = (1, 2, 3, 3, 2, 1, 1, 2, 3, 1)


def test_table_escapes_and_aligns() -> None:
    rows = [["loss", "4.71", HOSTILE], ["gap", DASH, "1"]]
    html = Table(columns=["", "MoR", "<b>"], rows=rows, caption=HOSTILE).html()
    reader = HTMLReader(html)
    assert reader.tags("caption") == [HOSTILE]
    assert reader.tags("td") == ["4.71", HOSTILE, DASH, "1"]
    assert reader.tags("th") == ["", "MoR", "<b>", "loss", "gap"]
    assert [text for _, _, text in reader.having("class", "number")] == ["MoR", "4.71", DASH]
    assert not reader.tags("script")
    HTMLReader(Table(columns=[], rows=[]).html())
    with pytest.raises(AssertionError):
        Table(columns=["a", "b"], rows=[["1"]])


def test_colored_text_keeps_every_character() -> None:
    html = ColoredText(pieces=PIECES, counts=COUNTS, num_recursions=3, prompt_tokens=2).html()
    reader = HTMLReader(html)
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
    reader = HTMLReader(text.html())
    assert [inner for _, _, inner in reader.having("class", "prompt")] == ["prompt", "ab"]
    legend = reader.having("class", "legend")[0][2]
    assert "1 75%" in legend
    assert "2 25%" in legend
    assert "3 0%" in legend
    assert "mean 1.25 of 3" in legend
    rare = ColoredText(pieces="a" * 2000, counts=[2] + [1] * 1999, num_recursions=2).html()
    assert "2 <0.1%" in HTMLReader(rare).having("class", "legend")[0][2]
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
    assert len(HTMLReader(text.html()).having("data-n")) == num_recursions


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
    HTMLReader(ColoredText(pieces=[], counts=[], num_recursions=3).html())


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
    reader = HTMLReader(html)
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
    policy = HTMLReader(html).having("http-equiv", "Content-Security-Policy")
    assert policy[0][1]["content"].startswith("default-src 'none';")
    links = [attrs for _, attrs, _ in HTMLReader(html).having("href")]
    assert [attrs["href"] for attrs in links] == ["data:,"]
    assert not HTMLReader(html).having("src")


def test_page_defines_every_variable_and_class_that_it_uses() -> None:
    html = sample_page()
    light, dark = html.split("prefers-color-scheme:dark", 1)
    used = set(re.findall(r"var\((--[\w-]+)", html)) - {"--shade"}
    for scheme in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+):#", scheme))
    for shade in DEPTH_COLORS + SERIES_COLORS:
        assert f":{shade.light};" in light
        assert f":{shade.dark};" in dark
    style = HTMLReader(html).tags("style")[0]
    for i in range(len(DEPTH_COLORS)):
        assert f".d{i}{{" in style
    assert "@media print" in style
    assert "white-space:pre-wrap" in style
    assert style.count("{") == style.count("}")
