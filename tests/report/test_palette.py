"""Contrast and order of the colors."""

from mor.report.palette import DARK_INK, DEPTH_COLORS, LIGHT_INK, SERIES_COLORS


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
