"""Orientations: three letters, one per array axis, that name the direction in the patient each axis runs to.

World coordinates are RAS+ in mm, as in NIfTI: x grows to the patient's right, y to anterior, z to superior.
"""

from __future__ import annotations

import numpy as np

from mome.errors import InputError

# Letter → (world axis, sign along it).
_DIRECTIONS = {"L": (0, -1), "R": (0, 1), "P": (1, -1), "A": (1, 1), "I": (2, -1), "S": (2, 1)}
_LETTERS = {direction: letter for letter, direction in _DIRECTIONS.items()}

Axes = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""For every array axis, the world axis it runs along and the sign, −1 or 1."""


def parse_orientation(text: str) -> Axes:
    """Reads an orientation such as "RAS", in either case, as `Axes`.

    Raises:
        InputError: `text` does not name each of the three world axes once.
    """
    letters = text.upper() if isinstance(text, str) else ""
    axes = [_DIRECTIONS[letter] for letter in letters if letter in _DIRECTIONS]
    if len(letters) != 3 or sorted(world for world, _ in axes) != [0, 1, 2]:
        raise InputError(
            f"orientation is three letters for three directions, one of R/L, A/P and S/I each, got {text!r:.60}",
            hint="orientation='RAS'",
        )
    return axes[0], axes[1], axes[2]


def orientation_letters(axes: Axes) -> str:
    """Returns the three letters of `axes`, the inverse of `parse_orientation`."""
    return "".join(_LETTERS[direction] for direction in axes)


def left_right_axis(text: str) -> int:
    """Returns the array axis, 0 to 2, along which left and right lie.

    Raises:
        InputError: `text` is not an orientation.
    """
    return [world for world, _ in parse_orientation(text)].index(0)


def closest_axes(affine: np.ndarray) -> Axes:
    """Returns the `Axes` that are closest to the directions of an affine; every world axis is used once.

    Args:
        affine: (4, 4), from voxels to RAS mm; it may be oblique.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    remaining = np.abs(directions)
    axes = [(0, 1)] * 3
    for _ in range(3):
        world, axis = np.unravel_index(int(np.argmax(remaining)), remaining.shape)
        axes[axis] = (int(world), 1 if directions[world, axis] > 0 else -1)
        remaining[world, :] = 0
        remaining[:, axis] = 0
    return axes[0], axes[1], axes[2]
