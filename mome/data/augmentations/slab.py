"""Short scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mome.data.augmentations.base import Cut


class Slab(Cut):
    """Keeps a slab of an eighth to the whole of the patch's height, with air elsewhere, as short scans are padded in
    inference (our choice).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `slab`.

        Args:
            probability: Share of the patches.
        """

        probability: float = 0.2

    def inside(self, rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
        axis = self.frame.height_axis
        side = shape[axis]
        height = int(rng.integers(max(side // 8, 1), side + 1))
        start = int(rng.integers(side - height + 1))
        planes = np.arange(side)
        sides = [1, 1, 1]
        sides[axis] = side
        return ((planes >= start) & (planes < start + height)).reshape(sides)
