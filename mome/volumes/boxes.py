"""Boxes around what a mask holds."""

from __future__ import annotations

import numpy as np

Box = tuple[slice, slice, slice]


def bounding_box(mask: np.ndarray) -> Box:
    """Returns the slices (i, j, k) that enclose everything but zeros; empty slices where there is nothing.

    Every axis is searched inside the range that the axes before it left.
    """
    box = [slice(0, side) for side in mask.shape]
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        hit = np.flatnonzero(mask[tuple(box)].any(axis=others))
        if not hit.size:
            return slice(0, 0), slice(0, 0), slice(0, 0)
        box[axis] = slice(int(hit[0]), int(hit[-1]) + 1)
    return box[0], box[1], box[2]
