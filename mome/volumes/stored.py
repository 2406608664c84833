"""Holds a volume as its file stores it: numbers of the file's own type with their scaling, not yet HU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mome.errors import InputError

# Voxels that are converted at once, so that no copy in float64 of the whole volume is made.
_VOXELS_AT_ONCE = 4_000_000


class SeveralVolumes(InputError):
    """A file holds several volumes, and none was chosen."""


@dataclass(frozen=True)
class StoredVolume:
    """The voxels of a file with their scaling and their place.

    Attributes:
        array: (i, j, k) in the type of the file; the value of a voxel is `slope` × number + `intercept`.
        affine: (4, 4) float64, from voxel indices to RAS mm.
        slope: See `array`.
        intercept: See `array`.
        header: See `Volume.header`.
        notes: See `Volume.notes`.
        not_ct: What the header says that the file is, where that is no CT (`mome.volumes.not_ct`); None otherwise.
    """

    array: np.ndarray
    affine: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0
    header: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    not_ct: str | None = None

    @property
    def is_scaled(self) -> bool:
        """Says whether values differ from the stored numbers."""
        return self.slope != 1 or self.intercept != 0

    def converted(self, dtype: np.dtype | type, change: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
        """Returns the values (i, j, k) as `dtype`, converted block by block.

        Args:
            dtype: The type of the result.
            change: Gets a block of values in float64 and the index of its first plane along the last axis, and
                returns what is stored.
        """
        out = np.empty(self.array.shape, dtype=dtype)
        planes = max(1, _VOXELS_AT_ONCE // max(1, self.array.shape[0] * self.array.shape[1]))
        # Values that float32 does not hold become infinite, which `checked_volume` repairs and notes.
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, self.array.shape[2], planes):
                block = self.array[:, :, start : start + planes].astype(np.float64)
                if self.is_scaled:
                    block = block * self.slope + self.intercept
                out[:, :, start : start + planes] = change(block, start)
        return out

    def as_float32(self) -> np.ndarray:
        """Returns the values (i, j, k) as float32."""
        if not self.is_scaled:
            with np.errstate(over="ignore", invalid="ignore"):
                return np.ascontiguousarray(self.array, dtype=np.float32)
        return self.converted(np.float32, lambda block, start: block)


def three_dimensions(array: np.ndarray, path: Path, frame: int | None) -> np.ndarray:
    """Returns one volume (i, j, k) of an array whose fourth axis counts volumes.

    Args:
        array: Two or more dimensions.
        path: The file that errors name.
        frame: The volume, from 0; it may be None where there is one only. A 3-D array has the frame 0.

    Raises:
        SeveralVolumes: There are several volumes and `frame` is None.
        InputError: There is no such frame, or the array is 2-D.
    """
    while array.ndim > 4 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 3:
        check_only_frame(frame, path)
    if array.ndim == 4:
        count = array.shape[3]
        if frame is None and count > 1:
            raise SeveralVolumes(
                f"the file holds {count} volumes",
                where=str(path),
                hint=f"choose one from 0 to {count - 1}: mome segment --frame 0, in Python frame=0",
            )
        chosen = frame or 0
        if not 0 <= chosen < count:
            raise InputError(
                f"frame {chosen} of {count} does not exist", where=str(path), hint=f"frames are 0 to {count - 1}"
            )
        array = array[..., chosen]
    if array.ndim != 3:
        raise InputError(
            f"a CT is a volume of three dimensions, this has shape {tuple(array.shape)}",
            where=str(path),
            hint="give the whole stack of slices",
        )
    return array


def check_only_frame(frame: int | None, path: Path) -> None:
    """Checks the frame that was asked of a scan of one volume; 0 may be asked of every scan of a folder.

    Raises:
        InputError: It is neither None nor 0.
    """
    if frame not in (None, 0):
        raise InputError(
            f"frame {frame} does not exist: the scan is one volume", where=str(path), hint="leave out --frame"
        )
