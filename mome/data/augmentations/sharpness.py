"""Changes of sharpness: blur, reconstruction kernels, thick slices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mome.data.augmentations.base import ImageChange, PatchFrame, per_patch
from mome.typed import check_range


class Blur(ImageChange):
    """Gaussian blur, whose width is uniform and different along the axes (our choice)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `blur`.

        Args:
            probability: Share of the patches.
            voxels: Largest standard deviation along each axis, in voxels.
        """

        probability: float = 0.2
        voxels: float = 1.0

    def __init__(self, config: Config, *, frame: PatchFrame) -> None:
        super().__init__(config, frame=frame)
        check_range("augmentation blur", 0, 5, voxels=config.voxels)
        self.voxels = config.voxels

    def change(self, volume_BDHW: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
        return blurred(volume_BDHW, [tuple(rng.uniform(0, self.voxels, 3)) for rng in rngs], self.voxels)


class Kernel(ImageChange):
    """y = x + a · (x − blur(x)) in the axial plane, with a uniform in ± `strength` (our choice).

    A negative a is a soft reconstruction kernel, a positive one a sharp kernel, which raises edges and noise.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `kernel`.

        Args:
            probability: Share of the patches.
            strength: Largest absolute a; 1 makes the softest kernel the blur itself.
            voxels: Standard deviation of the blur in voxels.
        """

        probability: float = 0.2
        strength: float = 0.8
        voxels: float = 1.0

    def __init__(self, config: Config, *, frame: PatchFrame) -> None:
        super().__init__(config, frame=frame)
        check_range("augmentation kernel", 0, 1, strength=config.strength)
        check_range("augmentation kernel", 0, 5, voxels=config.voxels)
        self.strength = config.strength
        width = [config.voxels] * 3
        width[frame.height_axis] = 0.0
        self.width = tuple(width)

    def change(self, volume_BDHW: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
        soft = blurred(volume_BDHW, [self.width] * len(rngs), max(self.width))
        share = per_patch([self.strength * rng.uniform(-1, 1) for rng in rngs], volume_BDHW)
        return volume_BDHW + share * (volume_BDHW - soft)


class LowResolution(ImageChange):
    """Averages over thick slices or large voxels and interpolates linearly between them (our choice)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `low_resolution`.

        Args:
            probability: Share of the patches.
            factor: Largest size of the averaged voxels, in voxels of the patch.
            along: `slices` averages along the body alone, `all` along the three axes.
        """

        probability: float = 0.2
        factor: float = 2.5
        along: Literal["slices", "all"] = "slices"

    def __init__(self, config: Config, *, frame: PatchFrame) -> None:
        super().__init__(config, frame=frame)
        check_range("augmentation low_resolution", 1, 10, factor=config.factor)
        self.factor = config.factor
        self.axes = (frame.height_axis,) if config.along == "slices" else (0, 1, 2)

    def change(self, volume_BDHW: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
        changed = []
        for patch_DHW, rng in zip(volume_BDHW, rngs, strict=True):
            factor = rng.uniform(1, self.factor)
            full = tuple(patch_DHW.shape)
            small = tuple(max(round(n / factor), 2) if axis in self.axes else n for axis, n in enumerate(full))
            coarse = F.interpolate(patch_DHW[None, None], size=small, mode="area")
            changed.append(F.interpolate(coarse, size=full, mode="trilinear", align_corners=False)[0, 0])
        return torch.stack(changed)


def blurred(volume_BDHW: Tensor, widths: Sequence[Sequence[float]], largest: float) -> Tensor:
    """Returns patches after a Gaussian blur; outside of a patch its outermost voxels go on.

    The sum is written out tap by tap, so that a patch is rounded in the same way in every batch.

    Args:
        volume_BDHW: The patches.
        widths: Standard deviation along D, H, W of each patch, in voxels.
        largest: No width is larger; it decides where the Gaussian is cut off.
    """
    radius = math.ceil(3 * largest)
    if not radius:
        return volume_BDHW
    for axis in range(3):
        weights = np.stack([_gaussian(width[axis], radius) for width in widths]).astype(np.float32)
        weights_BK111 = torch.from_numpy(weights).to(volume_BDHW.device)[..., None, None, None]
        size, pad = volume_BDHW.shape[1 + axis], [0] * 6
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = radius
        padded = F.pad(volume_BDHW[:, None], pad, mode="replicate")[:, 0]
        total = torch.zeros_like(volume_BDHW)
        for tap in range(2 * radius + 1):
            total = total + weights_BK111[:, tap] * padded.narrow(1 + axis, tap, size)
        volume_BDHW = total
    return volume_BDHW


def noise_gain(width: Sequence[float], largest: float) -> float:
    """Returns the standard deviation of white noise of deviation 1 after `blurred`."""
    radius = math.ceil(3 * largest)
    return math.prod(math.sqrt(float((_gaussian(side, radius) ** 2).sum())) for side in width)


def _gaussian(width: float, radius: int) -> np.ndarray:
    """Returns the weights (2 · radius + 1) of a Gaussian; a width of 0 keeps the middle alone."""
    taps = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (taps / max(width, 1e-3)) ** 2)
    return weights / weights.sum()
