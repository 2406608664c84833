"""An array of which everything outside of a box is zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Bytes of the planes that are put together at once.
_BYTES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class BoxedArray:
    """Values inside of a box of an array (i, j, k); all others are zero.

    Attributes:
        shape: Voxels of the whole array.
        first: The first voxel (i, j, k) of the box.
        values: The values inside of the box.
    """

    shape: tuple[int, int, int]
    first: tuple[int, int, int]
    values: np.ndarray

    @classmethod
    def whole(cls, array: np.ndarray) -> BoxedArray:
        """Returns an array as one whose box is everything."""
        return cls(array.shape, (0, 0, 0), array)

    def slabs(self, dtype: type) -> Iterator[tuple[int, np.ndarray | None]]:
        """Yields (number of planes, their values) along the last axis, one after the other.

        Args:
            dtype: Type of the values that are yielded.

        Yields:
            Values are (i, j, planes) in Fortran order, None where all planes are zero.
        """
        i, j, k = self.first
        height, width, planes = self.values.shape
        if not self.values.size:
            yield self.shape[2], None
            return
        if k:
            yield k, None
        is_whole = (height, width) == self.shape[:2]
        step = max(1, _BYTES_AT_ONCE // max(1, self.shape[0] * self.shape[1] * np.dtype(dtype).itemsize))
        for start in range(0, planes, step):
            part = self.values[:, :, start : start + step]
            if is_whole:
                yield part.shape[2], np.asarray(part, dtype=dtype, order="F")
                continue
            slab: np.ndarray = np.zeros((*self.shape[:2], part.shape[2]), dtype=dtype, order="F")
            slab[i : i + height, j : j + width] = part
            yield part.shape[2], slab
        if k + planes < self.shape[2]:
            yield self.shape[2] - k - planes, None
