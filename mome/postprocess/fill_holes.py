"""A mask with the holes inside of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mome.postprocess.base import MaskPlace, PostProcessor, Processed, millilitres
from mome.registry import at_least
from mome.volumes.grid import SPACING_ROUNDING


class FillHoles(PostProcessor):
    """Adds the holes of a mask: voxels from which no path of faces leads out of it (our choice).

    A hollow organ, such as the bowel, and a structure that lies inside of another one are holes too.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings.

        Args:
            largest_ml: The largest hole that is filled, in ml; None fills all.
        """

        largest_ml: float | None = None

    config: Config

    def __init__(self, config: Config) -> None:
        at_least(0, "fill_holes", largest_ml=config.largest_ml or 0)
        super().__init__(config)

    def apply(self, mask_IJK: np.ndarray, place: MaskPlace) -> Processed:
        """See `PostProcessor.apply`."""
        from scipy import ndimage

        # Inside of its smallest box, a mask has the same holes as in the whole scan.
        holes = ndimage.binary_fill_holes(mask_IJK) & ~mask_IJK
        if self.config.largest_ml is not None:
            numbers, count = ndimage.label(holes)
            sizes = np.bincount(numbers.reshape(-1), minlength=count + 1)
            small = sizes * place.voxel_ml <= self.config.largest_ml * (1 + 3 * SPACING_ROUNDING)
            holes &= small[numbers]
        added = int(np.count_nonzero(holes))
        if added == 0:
            return Processed(mask_IJK, None)
        return Processed(mask_IJK | holes, f"holes of {millilitres(added, place)} filled in")
