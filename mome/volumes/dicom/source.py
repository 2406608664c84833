"""The slices that a volume was read from, for writers whose files refer to them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mome.volumes.dicom.slices import Slice

# The key of `SourceSlices` in `Volume.header`.
SOURCE_KEY = "dicom"


@dataclass(frozen=True)
class SourceSlices:
    """The slices of a volume, one per place. Duplicates, localizers and slices that were left out are not among them.

    Attributes:
        slices: In the order of their places, along the normal of the slices.
        distances: (slices,) of each from the first in mm, along the line of positions.
        step: The distance between planes of the volume in mm.
        is_regular: Whether every slice is the plane of the same index; else planes were interpolated.
        shape: Voxels (columns, rows, planes) of the volume.
    """

    slices: list[Slice]
    distances: np.ndarray = field(compare=False)
    step: float
    is_regular: bool
    shape: tuple[int, int, int]

    def planes(self) -> np.ndarray:
        """Returns (slices,) the index of the plane that is closest to each slice."""
        if self.is_regular:
            return np.arange(len(self.slices))
        return np.clip(np.rint(self.distances / self.step).astype(int), 0, self.shape[2] - 1)

    def farthest(self) -> float:
        """Returns the largest distance of a slice from its closest plane in mm."""
        return 0.0 if self.is_regular else float(np.abs(self.planes() * self.step - self.distances).max())
