"""The largest piece of a mask and the pieces near it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mome.postprocess.base import MaskPlace, PostProcessor, Processed
from mome.postprocess.components import keep_pieces, label_pieces
from mome.registry import at_least
from mome.volumes.grid import SPACING_ROUNDING


class KeepNear(PostProcessor):
    """Keeps the largest connected piece (26 neighbours), and every piece at most `mm` from a piece that is kept.

    Pieces form chains in this way, as those of a spinal cord that is broken between slices do. Distances are measured
    between centres of voxels (our choice).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings.

        Args:
            mm: The largest gap between two pieces that belong together, in mm.
        """

        mm: float = 10.0

    config: Config

    def __init__(self, config: Config) -> None:
        at_least(0, "keep_near", mm=config.mm)
        super().__init__(config)

    def apply(self, mask_IJK: np.ndarray, place: MaskPlace) -> Processed:
        """See `PostProcessor.apply`."""
        from scipy import ndimage

        numbers_IJK, sizes = label_pieces(mask_IJK)
        kept = np.arange(len(sizes)) < 1
        reach = self.config.mm * (1 + SPACING_ROUNDING)
        while not kept.all():
            is_kept = np.concatenate([[False], kept])[numbers_IJK]
            distance_IJK = ndimage.distance_transform_edt(~is_kept, sampling=place.spacing)
            near = np.unique(numbers_IJK[(distance_IJK <= reach) & ~is_kept])
            near = near[near > 0]
            if len(near) == 0:
                break
            kept[near - 1] = True
        return keep_pieces(numbers_IJK, sizes, kept, place)
