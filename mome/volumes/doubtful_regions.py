"""Notes on parts of a body that are missing: replaced by one value within slices, or cut off along a plane."""

from __future__ import annotations

import math

import numpy as np

from mome.volumes.plane_counts import count_in_planes

# All thresholds are our choice; the scans and crops that we know stay below them.
_TISSUE = -300.0
# Voxels are compared on a sample of at most about this many per axis.
_MOST_PER_AXIS = 128
# Values that replace a part: of air, of padding, and of memory that was not written.
_FILLINGS = (0.0, -1000.0, -1024.0)
# A hole holds this share of the tissue of a plane, and nearly all tissue of its own rectangle.
_SMALLEST_HOLE, _FEWEST_SIDE, _FILLED = 0.18, 4, 0.9
# The share of tissue within a plane that a straight cut leaves, and the planes and the mm that it is looked for in.
_TISSUE_AT_CUT, _STEADY, _FEWEST_PLANES, _DEPTH_MM = 0.08, 0.6, 3, 15.0
# Beyond a cut lies this share of the planes. Many scans are padded with some planes of air.
_EMPTY = 0.4
# The share of tissue in planes that count as empty.
_MOST_IN_EMPTY = 0.005


def doubtful_regions(array: np.ndarray, spacing: tuple[float, float, float]) -> list[str]:
    """Returns notes on missing parts of a body.

    Args:
        array: (i, j, k), HU, finite.
        spacing: The voxel size along the axes in mm.
    """
    holes = _holes(array)
    notes = []
    if holes:
        notes.append(
            f"in {len(holes)} planes, as plane {holes[0] + 1}, one value stands where the planes beside have tissue: "
            "is a part of the image lost?"
        )
    for axis, name in enumerate("ijk"):
        place = _straight_cut(array, axis, spacing[axis])
        if place is not None:
            notes.append(
                f"the body ends along a straight plane between planes {place} and {place + 1} of axis {name}, and all "
                "beyond is air: was a part replaced or cut off?"
            )
    return notes


def _holes(array: np.ndarray) -> list[int]:
    """Returns planes of the last axis in which one value takes the place of tissue of both planes beside it."""
    steps = [max(1, side // _MOST_PER_AXIS) for side in array.shape[:2]]
    sample = array[:: steps[0], :: steps[1]]
    if sample.shape[2] < 3:
        return []
    tissue = sample > _TISSUE
    expected = tissue[:, :, :-2] & tissue[:, :, 2:]
    area = count_in_planes(expected)
    enough = area >= max(16, 0.04 * sample[:, :, 0].size)
    # Voxels of any value that is not tissue; where they are too few, so are those of one such value.
    hidden = count_in_planes(expected & ~tissue[:, :, 1:-1])
    may_hide = bool((enough & (hidden >= _SMALLEST_HOLE * area)).any())
    found: set[int] = set()
    for value in {*_FILLINGS, float(sample.min())}:
        if value <= _TISSUE and not may_hide:
            continue
        same = sample == value
        inside = count_in_planes(same[:, :, 1:-1] & expected)
        for k in np.flatnonzero(enough & (inside >= _SMALLEST_HOLE * area)).tolist():
            beside = max(int(np.count_nonzero(same[:, :, at] & expected[:, :, k])) for at in (k, k + 2))
            if beside < 0.5 * inside[k] and _is_block(same[:, :, k + 1], expected[:, :, k]):
                found.add(k + 1)
    return sorted(found)


def _is_block(same: np.ndarray, expected: np.ndarray) -> bool:
    """Says whether the voxels of a value where tissue is expected fill a rectangle. Clipped air is scattered.

    Args:
        same: (i, j) bool, where a plane has the value.
        expected: (i, j) bool, where both planes beside it have tissue.
    """
    rows, columns = np.nonzero(same & expected)
    # Some voxels elsewhere have the value by chance.
    (top, bottom), (left, right) = (np.percentile(places, (5, 95)).astype(int) for places in (rows, columns))
    block = slice(top, bottom + 1), slice(left, right + 1)
    filled, wanted = np.count_nonzero((same & expected)[block]), np.count_nonzero(expected[block])
    return bool(min(expected[block].shape) >= _FEWEST_SIDE and filled >= _FILLED * wanted)


def _straight_cut(array: np.ndarray, axis: int, step_mm: float) -> int | None:
    """Returns the number of planes before a cut along an axis, or None.

    Bodies end in planes of less and less tissue. Beyond the cut, there is hardly any.
    """
    steps = [1 if other == axis else max(1, side // _MOST_PER_AXIS) for other, side in enumerate(array.shape)]
    sample = array[:: steps[0], :: steps[1], :: steps[2]]
    empty = max(_FEWEST_PLANES, _EMPTY * array.shape[axis])
    if not _may_be_empty(np.moveaxis(sample, axis, 0), empty):
        return None
    share = (sample > _TISSUE).mean(axis=tuple(other for other in range(3) if other != axis))
    inside = np.flatnonzero(share > _MOST_IN_EMPTY)
    depth = max(_FEWEST_PLANES, round(_DEPTH_MM / step_mm))
    if inside.size < depth:
        return None
    first, last = int(inside[0]), int(inside[-1])
    if len(share) - 1 - last >= empty and _is_cut(share[last - depth + 1 : last + 1][::-1]):
        return last + 1
    if first >= empty and _is_cut(share[first : first + depth]):
        return first
    return None


def _may_be_empty(planes: np.ndarray, empty: float) -> bool:
    """Says whether at least `empty` planes at one end may hold hardly any tissue: the innermost of them is looked at.

    Args:
        planes: (planes, rows, columns), HU.
        empty: Number of planes.
    """
    last = len(planes) - 1
    if empty > last:
        return False
    innermost = (planes[at] > _TISSUE for at in (math.ceil(empty) - 1, int(last - empty) + 1))
    return any(bool(tissue.mean() <= _MOST_IN_EMPTY) for tissue in innermost)


def _is_cut(share: np.ndarray) -> bool:
    """Says whether the share of tissue of planes, from the last one of a body inwards, is large and steady."""
    return bool(share[0] >= _TISSUE_AT_CUT and share[0] >= _STEADY * share.max())
