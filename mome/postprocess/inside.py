"""The part of a mask inside of an organ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mome.errors import InputError
from mome.labels import load_table
from mome.postprocess.base import Box, MaskPlace, PostProcessor, Processed, millilitres
from mome.registry import at_least
from mome.volumes.grid import SPACING_ROUNDING


class Inside(PostProcessor):
    """Removes what lies outside of an organ, or farther than `mm` from it: a tumour of the liver lies in the liver.

    The organ must be among the prompts. Where its mask is empty, nothing is removed, and a note says so (our choice).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings.

        Args:
            organ: The organ, by its name or a synonym in the class table, or by the prompt's own text.
            mm: How far outside of the organ the mask may reach, in mm between centres of voxels.
        """

        organ: str
        mm: float = 0.0

    config: Config

    def __init__(self, config: Config) -> None:
        at_least(0, "inside", mm=config.mm)
        if not config.organ.strip():
            raise InputError("organ of inside is empty", hint="inside(organ='liver')")
        super().__init__(config)
        names = load_table().names_of(config.organ)
        if len(names) > 1:
            raise InputError(
                f"organ of inside names {len(names)} structures: {', '.join(names[:3])}, …", hint="name one of them"
            )
        self.reads = (names[0] if names else config.organ.strip(),)

    @property
    def organ(self) -> str:
        """The structure that it reads."""
        return self.reads[0]

    def apply(self, mask_IJK: np.ndarray, place: MaskPlace) -> Processed:
        """See `PostProcessor.apply`."""
        wide, inner = _grown(place, self.config.mm)
        organ_IJK = place.other(self.organ, wide)
        if not organ_IJK.any():
            whole: Box = ((0, place.shape[0]), (0, place.shape[1]), (0, place.shape[2]))
            if not place.other(self.organ, whole).any():
                return Processed(mask_IJK, f"nothing removed, because the mask of {self.organ} is empty, from")
            allowed_IJK = np.zeros_like(mask_IJK)
        elif self.config.mm:
            from scipy import ndimage

            distance_IJK = ndimage.distance_transform_edt(~organ_IJK, sampling=place.spacing)
            allowed_IJK = distance_IJK[inner] <= self.config.mm * (1 + SPACING_ROUNDING)
        else:
            allowed_IJK = organ_IJK[inner]
        removed = int(np.count_nonzero(mask_IJK & ~allowed_IJK))
        if removed == 0:
            return Processed(mask_IJK, None)
        return Processed(mask_IJK & allowed_IJK, f"{millilitres(removed, place)} outside of {self.organ} removed from")


def _grown(place: MaskPlace, mm: float) -> tuple[Box, tuple[slice, slice, slice]]:
    """Returns the mask's box with a margin of `mm`, inside of the scan, and the mask's box as slices of it."""
    wide, inner = [], []
    for (low, high), spacing, side in zip(place.box, place.spacing, place.shape, strict=True):
        margin = int(np.ceil(mm / spacing))
        start, stop = max(0, low - margin), min(side, high + margin)
        wide.append((start, stop))
        inner.append(slice(low - start, high - start))
    return (wide[0], wide[1], wide[2]), (inner[0], inner[1], inner[2])
