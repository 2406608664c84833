"""Changes of values that do not depend on their place: contrast, brightness, gamma, HU window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mome.data.augmentations.base import ImageChange, PatchFrame, per_patch
from mome.errors import InputError
from mome.typed import check_range


class Contrast(ImageChange):
    """y = c · (x − ½) + ½ + b, with c and b uniform (our choice)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `contrast`.

        Args:
            probability: Share of the patches.
            contrast: Largest relative change of contrast.
            hu: Largest change of brightness in HU.
        """

        probability: float = 0.5
        contrast: float = 0.1
        hu: float = 20.0

    def __init__(self, config: Config, *, frame: PatchFrame) -> None:
        super().__init__(config, frame=frame)
        check_range("augmentation contrast", 0, 1, contrast=config.contrast)
        check_range("augmentation contrast", 0, 5000, hu=config.hu)
        self.contrast, self.brightness = config.contrast, config.hu / frame.hu_width

    def change(self, volume_BDHW: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
        slope = per_patch([1 + self.contrast * rng.uniform(-1, 1) for rng in rngs], volume_BDHW)
        shift = per_patch([0.5 + self.brightness * rng.uniform(-1, 1) for rng in rngs], volume_BDHW)
        return (volume_BDHW - 0.5) * slope + shift


class Gamma(ImageChange):
    """y = x^γ, with log γ uniform (our choice)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `gamma`.

        Args:
            probability: Share of the patches.
            largest: Largest exponent; its inverse is the smallest.
        """

        probability: float = 0.3
        largest: float = 1.5

    def __init__(self, config: Config, *, frame: PatchFrame) -> None:
        super().__init__(config, frame=frame)
        check_range("augmentation gamma", 1, 5, largest=config.largest)
        self.largest = config.largest

    def change(self, volume_BDHW: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
        return volume_BDHW.clamp(0, 1) ** per_patch([self.largest ** rng.uniform(-1, 1) for rng in rngs], volume_BDHW)


class Window(ImageChange):
    """Shows the patch in an HU window whose ends are moved by uniform amounts (our choice).

    Values that the stored window cut off stay cut off.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `window`.

        Args:
            probability: Share of the patches.
            hu: Largest shift of each end of the window in HU.
        """

        probability: float = 0.3
        hu: float = 40.0

    def __init__(self, config: Config, *, frame: PatchFrame) -> None:
        super().__init__(config, frame=frame)
        if not 0 <= config.hu < frame.hu_width / 2:
            raise InputError(
                f"augmentation window moves the ends of a window of {frame.hu_width:g} HU by less than half of it, "
                f"got {config.hu:g}",
                hint=f"window(hu={frame.hu_width / 10:g})",
            )
        self.shift = config.hu / frame.hu_width

    def change(self, volume_BDHW: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
        low = [self.shift * rng.uniform(-1, 1) for rng in rngs]
        width = [1 + self.shift * rng.uniform(-1, 1) - start for start, rng in zip(low, rngs, strict=True)]
        return (volume_BDHW - per_patch(low, volume_BDHW)) / per_patch(width, volume_BDHW)
