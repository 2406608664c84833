"""Smooth random displacement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mome.data.augmentations.base import Movement, PatchFrame
from mome.errors import InputError
from mome.typed import check_range


class Elastic(Movement):
    """Displaces control points at random and interpolates between them, linearly (our choice).

    Displacements are normal with a random standard deviation, cut at twice its value.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `elastic`.

        Args:
            probability: Share of the patches.
            mm: Largest standard deviation of the displacement of a control point, in mm.
            distance: Distance between control points in mm, at least four times `mm`, or tissue would fold.
        """

        probability: float = 0.2
        mm: float = 4.0
        distance: float = 32.0

    def __init__(self, config: Config, *, frame: PatchFrame) -> None:
        super().__init__(config, frame=frame)
        check_range("augmentation elastic", 0, 1000, mm=config.mm, distance=config.distance)
        if config.distance < 4 * config.mm or config.distance <= 0:
            raise InputError(
                f"augmentation elastic has a distance of at least 4 × mm, got {config.distance:g} and {config.mm:g}",
                hint=f"elastic(mm={config.mm:g}, distance={max(4 * config.mm, 1):g})",
            )
        self.mm, self.distance = config.mm, config.distance

    def displacement(self, rng: np.random.Generator, shape: Sequence[int], device: torch.device) -> Tensor:
        extent = [side * step for side, step in zip(shape, self.frame.spacing, strict=True)]
        points = [max(round(length / self.distance), 1) + 1 for length in extent]
        # Few points may lie closer together than the setting says; their displacement shrinks with their distance.
        shrink = min(length / (count - 1) / self.distance for length, count in zip(extent, points, strict=True))
        sigma = self.mm * min(shrink, 1.0) * rng.random()
        control = (sigma * np.clip(rng.standard_normal((1, 3, *points)), -2, 2)).astype(np.float32)
        field = torch.from_numpy(control).to(device)
        return F.interpolate(field, size=tuple(shape), mode="trilinear", align_corners=True)[0]
