"""The contract of augmentations of training patches.

All randomness comes from the NumPy generators of the samples, so that a patch does not depend on the device, nor on the
other patches of its batch. Patches are float32 in [0, 1], the HU window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mome.typed import check_range


@dataclass(frozen=True)
class PatchFrame:
    """What augmentations know of a patch.

    Attributes:
        spacing: Voxel size along D, H, W in mm.
        left_right_axis: Axis of (D, H, W) along which left and right lie, as 0 on a RAS grid.
        height_axis: Axis that runs along the body, as 2 on a RAS grid.
        hu_window: HU of the values 0 and 1.
    """

    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    left_right_axis: int = 0
    height_axis: int = 2
    hu_window: tuple[float, float] = (-1000.0, 1000.0)

    @property
    def hu_width(self) -> float:
        """Width of the HU window."""
        return self.hu_window[1] - self.hu_window[0]


class Augmentation:
    """One augmentation. Subclass one of the four kinds below.

    Args:
        config: Its `probability` is the share of the patches that are changed.
        frame: Grid and window of the patches.

    Attributes:
        concerns: What it changes, in one sentence.

    Raises:
        InputError: The probability is not from 0 to 1.
    """

    concerns: ClassVar[str] = ""

    def __init__(self, config: Any, *, frame: PatchFrame) -> None:
        self.config, self.frame = config, frame
        self.probability: float = config.probability
        check_range("an augmentation", 0, 1, probability=self.probability)


class Flip(Augmentation):
    """Mirrors a patch exactly, without interpolation."""

    concerns = "Mirrors image and labels together, without interpolation."

    def axes(self, rng: np.random.Generator) -> tuple[int, ...]:
        """Returns the axes of (D, H, W) that are mirrored."""
        raise NotImplementedError

    def may_mirror(self, axis: int) -> bool:
        """Says whether an axis is ever mirrored."""
        return True


class Movement(Augmentation):
    """Changes where the voxels lie. All movements of a patch are one interpolation."""

    concerns = "Moves image and labels together, in one interpolation with the other movements."

    def matrix(self, rng: np.random.Generator) -> np.ndarray | None:
        """Returns a matrix (3, 3) from places in the result to places in the patch, in mm from the centre."""
        return None

    def displacement(self, rng: np.random.Generator, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """Returns the distance (3, D, H, W) in mm from a voxel of the result to the place that it shows."""
        return None


class ImageChange(Augmentation):
    """Changes values, not labels. The result may leave [0, 1]; it is clipped after all changes."""

    concerns = "Changes the image alone."

    def change(self, volume_BDHW: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
        """Returns the changed patches.

        Args:
            volume_BDHW: The patches that were chosen.
            rngs: One generator per patch.
        """
        raise NotImplementedError


class Cut(Augmentation):
    """Replaces a part of a patch by air without labels."""

    concerns = "Removes a part of image and labels together, after all other changes."

    def inside(self, rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
        """Returns what stays, bool, broadcastable to (D, H, W)."""
        raise NotImplementedError


def per_patch(values: Sequence[float], like: Tensor) -> Tensor:
    """Returns one number per patch as (B, 1, 1, 1), of the type and on the device of `like`."""
    return torch.tensor(list(values), dtype=torch.float32).to(like)[:, None, None, None]
