"""Noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mome.data.augmentations.base import ImageChange, PatchFrame, per_patch
from mome.data.augmentations.sharpness import blurred, noise_gain
from mome.data.counter_noise import normal_noise
from mome.typed import check_range


class Noise(ImageChange):
    """Adds normal noise whose standard deviation is uniform up to `hu` (our choice).

    With `grain`, neighbouring voxels are correlated, as smooth reconstruction kernels make them.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `noise`.

        Args:
            probability: Share of the patches.
            hu: Largest standard deviation in HU.
            grain: Largest width of the correlation in voxels (standard deviation of a Gaussian); 0 is white noise.
        """

        probability: float = 0.5
        hu: float = 30.0
        grain: float = 0.0

    def __init__(self, config: Config, *, frame: PatchFrame) -> None:
        super().__init__(config, frame=frame)
        check_range("augmentation noise", 0, 5000, hu=config.hu)
        check_range("augmentation noise", 0, 3, grain=config.grain)
        self.sigma, self.grain = config.hu / frame.hu_width, config.grain

    def change(self, volume_BDHW: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
        sigma = [self.sigma * rng.random() for rng in rngs]
        keys = [(int(a), int(b)) for a, b in (rng.integers(2**32, size=2) for rng in rngs)]
        noise_BDHW = normal_noise(keys, volume_BDHW.shape[1:], volume_BDHW.device)
        if self.grain:
            widths = [(self.grain * rng.random(),) * 3 for rng in rngs]
            noise_BDHW = blurred(noise_BDHW, widths, self.grain)
            sigma = [value / noise_gain(width, self.grain) for value, width in zip(sigma, widths, strict=True)]
        return volume_BDHW + per_patch(sigma, volume_BDHW) * noise_BDHW
