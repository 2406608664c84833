"""Short scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mome.data.augmentations.base import Cut, PatchFrame
from mome.typed import check_range


class Slab(Cut):
    """Keeps a slab of an eighth to the whole of the patch's height, with air elsewhere, as short scans are padded in
    inference (our choice).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `slab`.

        Args:
            probability: Share of the patches.
            short: Share of the slabs that have at most a quarter of the patch's height; the others have any height.
        """

        probability: float = 0.2
        short: float = 0.0

    def __init__(self, config: Config, *, frame: PatchFrame) -> None:
        super().__init__(config, frame=frame)
        check_range("augmentation slab", 0, 1, short=config.short)

    def inside(self, rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
        axis = self.frame.height_axis
        side = shape[axis]
        short = self.config.short > 0 and rng.random() < self.config.short
        height = int(rng.integers(max(side // 8, 1), max(side // 4 if short else side, 1) + 1))
        start = int(rng.integers(side - height + 1))
        planes = np.arange(side)
        sides = [1, 1, 1]
        sides[axis] = side
        return ((planes >= start) & (planes < start + height)).reshape(sides)
