"""Colours of labels that the class table does not have."""

from __future__ import annotations

import colorsys

_GOLDEN_RATIO = 0.618034  # steps of this share of the colour circle keep all earlier colours apart


def color_of_number(number: int) -> tuple[int, int, int]:
    """Returns (red, green, blue), each from 0 to 255, for the number of a label; our choice."""
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN_RATIO % 1, 0.6, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)
