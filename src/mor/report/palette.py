"""The colors of charts, of text colored by recursion count, and of the terminal.

They were chosen by measurement. `DEPTH_COLORS`: in simulated protanopia, deuteranopia and
tritanopia any two neighboring colors of three recursions differ by at least 0.1 in OKLab; lightness
is monotonic in depth, so that the order survives in grayscale; text on each color has a contrast of
at least 4.5. `SERIES_COLORS`: each has a contrast of at least 3 with its page.
"""

from dataclasses import dataclass

MAX_RECURSIONS = 8


@dataclass(frozen=True, kw_only=True)
class ColorPair:
    """A color as #rrggbb, once for light pages and once for dark ones."""

    light: str
    dark: str


LIGHT_INK = "#16181d"
"""Color of text on a light page and on the `light` variant of all depth colors."""

DARK_INK = "#f2f3f5"
"""Color of text on a dark page and on the `dark` variant of all depth colors."""

DEPTH_COLORS: tuple[ColorPair, ...] = (
    ColorPair(light="#f9f5da", dark="#2b281d"),
    ColorPair(light="#e2edca", dark="#2f341a"),
    ColorPair(light="#c5e6c2", dark="#284223"),
    ColorPair(light="#a4dfc3", dark="#0e5038"),
    ColorPair(light="#82d6cc", dark="#005c55"),
    ColorPair(light="#65cad7", dark="#006676"),
    ColorPair(light="#59bae3", dark="#006b98"),
    ColorPair(light="#64a6e9", dark="#316cb5"),
)
"""Backgrounds of tokens, from few recursions (nearly the page's own color) to many."""

SERIES_COLORS: tuple[ColorPair, ...] = (
    ColorPair(light="#1558b0", dark="#5b9df9"),
    ColorPair(light="#d1500f", dark="#fc8a3f"),
    ColorPair(light="#2f9f86", dark="#8fe8c8"),
    ColorPair(light="#6d1250", dark="#c58bb0"),
    ColorPair(light="#ab8f08", dark="#f3e04a"),
    ColorPair(light="#8587cc", dark="#b6b9f0"),
)
"""Colors of lines and bars, in the order of the series."""


def depth_color_index(count: int, num_recursions: int) -> int:
    """Index into `DEPTH_COLORS` for a token of `count` recursions out of `num_recursions`.

    Counts are spread evenly over all colors: 1 has the first one and, unless it is 1 itself,
    `num_recursions` the last.
    """
    assert 1 <= num_recursions <= MAX_RECURSIONS, num_recursions
    assert 1 <= count <= num_recursions, (count, num_recursions)
    if num_recursions == 1:
        return 0
    last = len(DEPTH_COLORS) - 1
    # (count - 1) / (num_recursions - 1) * last, rounded half up, in integers.
    return (2 * (count - 1) * last + num_recursions - 1) // (2 * (num_recursions - 1))
