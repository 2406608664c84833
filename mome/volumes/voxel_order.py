"""Recognises noise and voxels in another order than the header says, by how much neighbours differ.

All thresholds are our choice.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

# Distant voxels of a scan differ by this many HU at least. Noise of a scanner has a standard deviation of some ten HU,
# whose mean difference is about as large.
_SMALLEST_DISTANT = 100.0
# The difference of neighbours, as a share of that of distant voxels, above which all of a volume is noise.
_NOISE = 0.85
# The same along one axis, above which the order was lost; crops of fewer voxels may hold less contrast.
_UNLIKE, _UNLIKE_IN_CROPS, _WHOLE = 0.38, 0.7, 300_000
# Neighbours along another axis are alike, by this factor at least.
_ALIKE = 0.6
# Half of the side of the block in the middle of a volume that is looked at.
_HALF_SIDE = 64


class Differences:
    """Mean differences of voxels in the middle of a volume; each is computed when it is first asked for.

    Args:
        values: (i, j, k), HU.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.shape = values.shape
        self._block = values[tuple(slice(max(0, n // 2 - _HALF_SIDE), n // 2 + _HALF_SIDE) for n in values.shape)]

    @cached_property
    def nearest(self) -> list[float]:
        """Returns the mean difference of neighbours along each axis."""
        return [_mean_size(np.diff(self._block, axis=axis)) for axis in range(3)]

    @cached_property
    def distant(self) -> float:
        """Returns the mean difference of voxels that were put in random order."""
        return _mean_size(np.diff(np.random.default_rng(0).permutation(self._block.reshape(-1))))

    def may_reach(self, nearest: float, share: float) -> bool:
        """Says whether a difference of neighbours may be a share of that of distant voxels, which is not computed.

        Args:
            nearest: One of the numbers in `nearest`.
            share: See above. Differences of distant voxels below `_SMALLEST_DISTANT` do not count.
        """
        return nearest >= share * _SMALLEST_DISTANT or not math.isfinite(sum(self.nearest))


def is_noise(differences: Differences) -> bool:
    """Says whether neighbouring voxels differ as much as distant ones, and by more than the noise of a scanner.

    Args:
        differences: Of a volume.
    """
    if len(differences.shape) != 3 or min(differences.shape) < 3:
        return False
    lowest = min(differences.nearest)
    if not differences.may_reach(lowest, _NOISE):
        return False
    return not (differences.distant < _SMALLEST_DISTANT or lowest < _NOISE * differences.distant)


def other_order(differences: Differences) -> str | None:
    """Returns a note where the voxels of a scan are in another order than the header says.

    Where a file of Fortran's order is read in that of C, neighbours along one or two axes are as unlike as distant
    voxels.

    Args:
        differences: Of a volume (i, j, k) of HU, finite.
    """
    if min(differences.shape) < 3:
        return None
    nearest, unlike = differences.nearest, _UNLIKE if math.prod(differences.shape) >= _WHOLE else _UNLIKE_IN_CROPS
    if min(nearest) > _ALIKE * max(nearest) or not differences.may_reach(max(nearest), unlike):
        return None
    if differences.distant < _SMALLEST_DISTANT or max(nearest) < unlike * differences.distant:
        return None
    axis = "ijk"[int(np.argmax(nearest))]
    return (
        f"neighbouring voxels along axis {axis} are nearly as unlike as distant ones: the voxels may be in another "
        "order than the header says (C and Fortran order mixed up?)"
    )


def _mean_size(differences: np.ndarray) -> float:
    return float(np.abs(differences, out=differences).mean())
