"""Notes on parts of a body that are missing: replaced by one value within slices, or cut off along a plane."""

from __future__ import annotations

import numpy as np

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
    area = expected.sum(axis=(0, 1))
    enough = area >= max(16, 0.04 * sample[:, :, 0].size)
    found: set[int] = set()
    for value in {*_FILLINGS, float(sample.min())}:
        same = sample == value
        inside = (same[:, :, 1:-1] & expected).sum(axis=(0, 1))
        beside = np.maximum((same[:, :, :-2] & expected).sum(axis=(0, 1)), (same[:, :, 2:] & expected).sum(axis=(0, 1)))
        hole = enough & (inside >= _SMALLEST_HOLE * area) & (beside < 0.5 * inside)
        found.update(int(k) + 1 for k in np.flatnonzero(hole) if _is_block(same[:, :, k + 1], expected[:, :, k]))
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
    share = (sample > _TISSUE).mean(axis=tuple(other for other in range(3) if other != axis))
    inside = np.flatnonzero(share > 0.005)
    depth = max(_FEWEST_PLANES, round(_DEPTH_MM / step_mm))
    empty = max(_FEWEST_PLANES, _EMPTY * len(share))
    if inside.size < depth:
        return None
    first, last = int(inside[0]), int(inside[-1])
    if len(share) - 1 - last >= empty and _is_cut(share[last - depth + 1 : last + 1][::-1]):
        return last + 1
    if first >= empty and _is_cut(share[first : first + depth]):
        return first
    return None


def _is_cut(share: np.ndarray) -> bool:
    """Says whether the share of tissue of planes, from the last one of a body inwards, is large and steady."""
    return bool(share[0] >= _TISSUE_AT_CUT and share[0] >= _STEADY * share.max())
