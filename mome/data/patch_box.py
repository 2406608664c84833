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


def cut_middle(low: int, high: int, size: int, side: int, rng: np.random.Generator) -> int | None:
    """Draws the middle of a patch, along one axis, that ends inside a structure; our choice.

    The patch shows one end of the structure, by 1 voxel to a quarter of the patch's side, and the rest of it lies
    behind the patch's face. Nothing of the case is cut off: only where the patch lies is drawn.

    Args:
        low: First voxel of the structure along the axis.
        high: Its last voxel.
        size: Voxels of the case.
        side: Voxels of the patch.
        rng: Generator of the draws.

    Returns:
        The middle, or None where the case has no room for such a patch.
    """
    most = min(side // 4, high - low)
    if most < 1:
        return None
    shown = int(rng.integers(1, most + 1))
    starts = [start for start in (low + shown - side, high + 1 - shown) if 0 <= start <= size - side]
    return starts[rng.integers(len(starts))] + side // 2 if starts else None


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
