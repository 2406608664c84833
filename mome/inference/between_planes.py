"""The voxels of a scan that lie between two planes of a network grid which is oblique to the scan's grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Positions are exact to about 1e-13 planes; a box that is this close to a part is looked at voxel by voxel.
_CLOSE = 1e-6


@dataclass(frozen=True)
class BetweenPlanes:
    """One of the parts that a scan is cut into along planes of the network grid.

    Scans often have slices that lie on network planes, where rounding decides on which side a voxel is. The position of
    a voxel is therefore computed from its indices in the whole scan and never from those in a block: each voxel has one
    position, and belongs to exactly one part.

    Attributes:
        row: (4,) float64, the position of a voxel (i, j, k, 1) of the scan in planes of the whole network grid.
        low: The lowest position of the part.
        high: The first position above the part.
    """

    row: np.ndarray
    low: float
    high: float

    def contains(self, first: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Says which voxels of a box of the scan belong to the part, bool (i, j, k).

        Args:
            first: The first voxel of the box in the scan.
            shape: Voxels of the box.
        """
        i, j, k = (
            torch.arange(at, at + side, dtype=torch.float64) * float(step)
            for at, side, step in zip(first, shape, self.row[:3], strict=True)
        )
        at_IJK = (i + float(self.row[3]))[:, None, None] + j[None, :, None] + k
        return (at_IJK >= self.low) & (at_IJK < self.high)

    def misses(self, first: Sequence[int], shape: Sequence[int]) -> bool:
        """Says whether no voxel of a box of the scan can belong to the part; see `contains`."""
        ends = [(at * step, (at + side - 1) * step) for at, side, step in zip(first, shape, self.row[:3], strict=True)]
        lowest, highest = (float(self.row[3]) + sum(choose(end) for end in ends) for choose in (min, max))
        return bool(highest < self.low - _CLOSE or lowest > self.high + _CLOSE)
