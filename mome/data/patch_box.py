"""Cuts patches out of cached arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def patch_start(shape: Sequence[int], centre: Sequence[int], patch: Sequence[int], beyond: float = 0.0) -> list[int]:
    """Returns the first voxel of the patch around `centre`, shifted until it lies inside.

    On axes shorter than the patch it is negative, and the case lies in the middle of the patch.

    Args:
        shape: Voxels of the case.
        centre: Voxel in the middle of the patch.
        patch: Voxels of the patch.
        beyond: Share of the patch's side by which it may lie outside.
    """
    start = []
    for middle, side, size in zip(centre, patch, shape, strict=True):
        low, high = (0, size - side) if size >= side else ((size - side) // 2,) * 2
        reach = round(beyond * side)
        start.append(min(max(middle - side // 2, low - reach), high + reach))
    return start


def read_box(array: Any, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Returns a box of an array; what lies outside of the array is 0 (air).

    Args:
        array: (D, H, W), a NumPy array or another from which slices read a box.
        start: First voxel of the box, which may lie outside.
        size: Voxels of the box.
    """
    out = np.zeros(tuple(size), dtype=array.dtype)
    read, write = [], []
    for first, side, whole in zip(start, size, array.shape, strict=True):
        low, high = max(first, 0), min(first + side, whole)
        if low >= high:
            return out
        read.append(slice(low, high))
        write.append(slice(low - first, high - first))
    out[tuple(write)] = array[tuple(read)]
    return out
