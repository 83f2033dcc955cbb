"""Text colored by recursion count for the terminal, in the colors of the HTML reports.

Foreground and background are always set together, so that the text is readable on light and on dark
terminals. Tokens of one recursion stay plain. For readers and terminals without colors, underline,
bold and italics tell the counts apart, too.
"""

from collections.abc import Sequence

from rich.style import Style
from rich.text import Text

from mor.report.palette import DEPTH_COLORS, LIGHT_INK, depth_color_index


def colored_text(pieces: Sequence[str], counts: Sequence[int], num_recursions: int) -> Text:
    """The pieces in a row, each in the style of its recursion count (1 to `num_recursions`).

    Control characters other than newline and tab become visible symbols, because a terminal would
    obey them; rich's markup in a piece stays text.
    """
    assert len(pieces) == len(counts), (len(pieces), len(counts))
    styles = [_style(n, num_recursions) for n in range(1, num_recursions + 1)]
    text = Text()
    for piece, count in zip(pieces, counts, strict=True):
        assert 1 <= count <= num_recursions, (count, num_recursions)
        text.append("".join(map(_make_harmless, piece)), styles[count - 1])
    return text


def depth_legend(num_recursions: int) -> Text:
    """A line with the style of every recursion count."""
    counts = range(1, num_recursions + 1)
    chips = [Text(f" {count} ", _style(count, num_recursions)) for count in counts]
    return Text(" ").join([Text("recursions per token:"), *chips])


def _style(count: int, num_recursions: int) -> Style:
    """The background of the count; underline, bold and italic are the bits of count - 1."""
    background = DEPTH_COLORS[depth_color_index(count, num_recursions)].light
    plain = count == 1
    cues = count - 1
    return Style(
        color=None if plain else LIGHT_INK,
        bgcolor=None if plain else background,
        underline=bool(cues & 1),
        bold=bool(cues & 2),
        italic=bool(cues & 4),
    )


def _make_harmless(char: str) -> str:
    """The character itself, or a visible symbol of it if a terminal would obey it."""
    code = ord(char)
    if char in "\n\t" or not (code < 0x20 or 0x7F <= code < 0xA0):
        return char
    if code < 0x20:
        return chr(0x2400 + code)  # U+2400 on: a symbol for each control character
    return "\N{SYMBOL FOR DELETE}" if code == 0x7F else "\N{REPLACEMENT CHARACTER}"
