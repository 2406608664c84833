"""Rotation and zoom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mome.data.augmentations.base import Movement, PatchFrame
from mome.typed import check_range


class Rotate(Movement):
    """Rotates about the three axes by uniform angles, in mm, so that thick slices shear nothing (our choice)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `rotate`.

        Args:
            probability: Share of the patches.
            degrees: Largest angle about each axis.
        """

        probability: float = 0.3
        degrees: float = 15.0

    def __init__(self, config: Config, *, frame: PatchFrame) -> None:
        super().__init__(config, frame=frame)
        check_range("augmentation rotate", 0, 180, degrees=config.degrees)
        self.degrees = config.degrees

    def matrix(self, rng: np.random.Generator) -> np.ndarray:
        matrix = np.eye(3)
        for axis, angle in enumerate(np.deg2rad(rng.uniform(-self.degrees, self.degrees, 3))):
            a, b = (i for i in range(3) if i != axis)
            rotation = np.eye(3)
            rotation[[a, b], [a, b]] = np.cos(angle)
            rotation[a, b], rotation[b, a] = -np.sin(angle), np.sin(angle)
            matrix = matrix @ rotation
        return matrix


class Scale(Movement):
    """Zooms by a uniform factor, and by a further one along each axis (our choice)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `scale`.

        Args:
            probability: Share of the patches.
            share: Largest relative change of all axes together, as in 0.15 for 85 % to 115 %.
            per_axis: Largest further change of each axis by itself.
        """

        probability: float = 0.3
        share: float = 0.15
        per_axis: float = 0.0

    def __init__(self, config: Config, *, frame: PatchFrame) -> None:
        super().__init__(config, frame=frame)
        # at 1, the smallest patch would have no extent
        check_range("augmentation scale", 0, 0.9, share=config.share, per_axis=config.per_axis)
        self.share, self.per_axis = config.share, config.per_axis

    def matrix(self, rng: np.random.Generator) -> np.ndarray:
        zoom = 1 + self.share * rng.uniform(-1, 1)
        return np.diag(zoom * (1 + self.per_axis * rng.uniform(-1, 1, 3)))
