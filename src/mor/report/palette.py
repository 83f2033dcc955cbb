"""Colors that charts, colored token text and the terminal share.

Both ramps were chosen by measurement: in simulated protanopia, deuteranopia and tritanopia any two
neighboring shades of three recursions differ by at least 0.1 in OKLab, lightness is monotonic in
depth (so the order survives in greyscale), and text on every shade has a contrast of at least 4.5.
"""

from dataclasses import dataclass

MAX_RECURSIONS = 8


@dataclass(frozen=True, kw_only=True)
class ColorPair:
    """One color in its variant for a light page and its variant for a dark page, as #rrggbb."""

    light: str
    dark: str


LIGHT_INK = "#16181d"
"""Text on the light variant of every depth shade, and on a light page."""

DARK_INK = "#f2f3f5"
"""Text on the dark variant of every depth shade, and on a dark page."""

DEPTH_SHADES: tuple[ColorPair, ...] = (
    ColorPair(light="#f9f5da", dark="#2b281d"),
    ColorPair(light="#e2edca", dark="#2f341a"),
    ColorPair(light="#c5e6c2", dark="#284223"),
    ColorPair(light="#a4dfc3", dark="#0e5038"),
    ColorPair(light="#82d6cc", dark="#005c55"),
    ColorPair(light="#65cad7", dark="#006676"),
    ColorPair(light="#59bae3", dark="#006b98"),
    ColorPair(light="#64a6e9", dark="#316cb5"),
)
"""Token backgrounds from few recursions (nearly the page's own color) to many."""

SERIES_SHADES: tuple[ColorPair, ...] = (
    ColorPair(light="#1558b0", dark="#5b9df9"),
    ColorPair(light="#d1500f", dark="#fc8a3f"),
    ColorPair(light="#2f9f86", dark="#8fe8c8"),
    ColorPair(light="#6d1250", dark="#c58bb0"),
    ColorPair(light="#ab8f08", dark="#f3e04a"),
    ColorPair(light="#8587cc", dark="#b6b9f0"),
)
"""Lines and bars of charts, in the order in which series take them."""


def shade_index(count: int, num_recursions: int) -> int:
    """Index into `DEPTH_SHADES` for a token of `count` recursions out of `num_recursions`.

    The shades are spread evenly over the whole ramp, so 1 always takes the first shade and
    `num_recursions` (where it is more than 1) the last.
    """
    assert 1 <= num_recursions <= MAX_RECURSIONS, num_recursions
    assert 1 <= count <= num_recursions, (count, num_recursions)
    if num_recursions == 1:
        return 0
    last = len(DEPTH_SHADES) - 1
    return (2 * (count - 1) * last + num_recursions - 1) // (2 * (num_recursions - 1))
