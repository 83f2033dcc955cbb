"""Colored text in the terminal: nothing lost, nothing obeyed, depth visible without color."""

import io

import pytest
from rich.console import Console
from rich.style import Style

from mor.report.palette import DEPTH_COLORS, LIGHT_INK
from mor.terminal.color import colored_text, depth_legend


def styles(counts: list[int], num_recursions: int) -> list[Style]:
    text = colored_text([str(count) for count in counts], counts, num_recursions)
    found = [span.style for span in text.spans]
    assert all(isinstance(style, Style) for style in found)
    return [style for style in found if isinstance(style, Style)]


def test_every_character_is_kept_and_markup_is_not_read() -> None:
    pieces = ["def", " f[bold](x)", ":\n", "\t", "[/red]", "é→🙂", ""]
    text = colored_text(pieces, [1, 2, 3, 1, 2, 3, 1], 3)
    assert text.plain == "".join(pieces)
    assert [text.plain[s.start : s.end] for s in text.spans if "f" in text.plain[s.start : s.end]]


def test_each_piece_has_the_style_of_its_count() -> None:
    text = colored_text(["ab", "c", "def"], [3, 2, 3], 3)
    assert [(span.start, span.end) for span in text.spans] == [(0, 2), (2, 3), (3, 6)]
    deep, middle, again = (span.style for span in text.spans)
    assert deep == again != middle
    assert isinstance(deep, Style)
    assert deep.bgcolor is not None
    assert deep.bgcolor.name == DEPTH_COLORS[-1].light
    assert deep.color is not None
    assert deep.color.name == LIGHT_INK


@pytest.mark.parametrize("num_recursions", range(1, 9))
def test_counts_differ_with_and_without_color(num_recursions: int) -> None:
    counts = list(range(1, num_recursions + 1))
    cues = [style.without_color for style in (s or Style() for s in styles(counts, num_recursions))]
    if num_recursions > 1:
        assert len({str(cue) for cue in cues}) == len(cues)
    backgrounds = {str(style.bgcolor) for style in styles(counts, num_recursions)}
    assert len(backgrounds) == len(cues)
    for style in styles(counts, num_recursions):
        assert (style.color is None) is (style.bgcolor is None), "unreadable on some terminals"


@pytest.mark.parametrize("num_recursions", range(1, 9))
def test_legend_shows_every_count_in_the_style_of_the_text(num_recursions: int) -> None:
    legend = depth_legend(num_recursions)
    counts = list(range(1, num_recursions + 1))
    assert legend.plain.split() == ["recursions", "per", "token:", *map(str, counts)]
    shown = {legend.plain[s.start : s.end].strip(): s.style for s in legend.spans}
    expected = dict(zip(map(str, counts), styles(counts, num_recursions), strict=True))
    assert {n: style for n, style in shown.items() if style} == {
        n: style for n, style in expected.items() if style
    }


def test_terminal_commands_in_the_text_become_visible() -> None:
    hostile = "\x1b[2J\x07\x9b31m\x7f\x00\r\b"
    text = colored_text([hostile], [1], 3)
    assert text.plain == "␛[2J␇�31m␡␀␍␈"
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=False).print(text)
    assert out.getvalue() == text.plain + "\n"


def test_impossible_counts_are_refused() -> None:
    for count in (0, 4):
        with pytest.raises(AssertionError):
            colored_text(["a"], [count], 3)
    with pytest.raises(AssertionError):
        colored_text(["a", "b"], [1], 3)
    with pytest.raises(AssertionError):
        depth_legend(9)
    assert colored_text([], [], 3).plain == ""
