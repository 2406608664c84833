"""Metal, and the streaks that it throws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mome.data.augmentations.base import ImageChange, PatchFrame
from mome.typed import check_range

# Titanium at 60, 80 and 100 keV: mass attenuation (NIST XCOM) × 4.506 g/cm³, per mm. The weights are our choice.
_TITANIUM = (0.3452, 0.1826, 0.1226)
_SPECTRUM = (0.3, 0.4, 0.3)
_WATER = 0.0184  # per mm, at 80 keV
_VIEWS = 120


class Metal(ImageChange):
    """Draws ellipsoids of metal and the streaks of beam hardening and of photon starvation.

    The path L of a ray through an ellipse is known in closed form. A scanner that takes the beam as having one energy
    measures −log Σ w exp(−μL) in place of L Σ wμ. The difference, and noise that grows as photons get rare, are
    filtered and projected back into the image. Formulas: Kak and Slaney 1988, Principles of Computerized Tomographic
    Imaging, chapter 3. Places, sizes and strengths are our choice. Labels stay: contours are drawn through metal.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `metal`.

        Args:
            probability: Share of the patches.
            pieces: Largest number of pieces of metal.
            mm: Largest radius of a piece in mm.
            noise: Largest standard deviation of the attenuation that a ray without metal would be measured with.
        """

        probability: float = 0.05
        pieces: int = 3
        mm: float = 6.0
        noise: float = 0.02

    def __init__(self, config: Config, *, frame: PatchFrame) -> None:
        super().__init__(config, frame=frame)
        check_range("augmentation metal", 1, 20, pieces=config.pieces)
        check_range("augmentation metal", 0.5, 100, mm=config.mm)
        check_range("augmentation metal", 0, 1, noise=config.noise)
        self.pieces, self.mm, self.noise = config.pieces, config.mm, config.noise

    def change(self, volume_BDHW: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
        return torch.stack([self._with_metal(patch, rng) for patch, rng in zip(volume_BDHW, rngs, strict=True)])

    def _with_metal(self, patch_DHW: Tensor, rng: np.random.Generator) -> Tensor:
        """Returns one patch with metal."""
        height = self.frame.height_axis
        in_plane = [axis for axis in range(3) if axis != height]
        order = [height, *in_plane]
        planes_ZYX = patch_DHW.permute(order)
        spacing = [self.frame.spacing[axis] for axis in order]
        axes = [
            (torch.arange(side, device=patch_DHW.device, dtype=torch.float32) - (side - 1) / 2) * step
            for side, step in zip(planes_ZYX.shape, spacing, strict=True)
        ]
        count = int(rng.integers(1, self.pieces + 1))
        middle = planes_ZYX.shape[0] * spacing[0] * rng.uniform(-0.4, 0.4)  # pieces lie at one height, as teeth do
        reach = [side * step * 0.4 for side, step in zip(planes_ZYX.shape[1:], spacing[1:], strict=True)]
        pieces = [
            _Ellipsoid(
                centre=(middle + self.mm * rng.uniform(-1, 1), *(float(r * rng.uniform(-1, 1)) for r in reach)),
                radii=tuple(float(self.mm * rng.uniform(0.3, 1)) for _ in range(3)),
            )
            for _ in range(count)
        ]
        shown = self._planes(pieces, planes_ZYX.shape[0], spacing[0])
        step = min(spacing[1:])
        half = math.ceil(math.hypot(*(side * size / 2 for side, size in zip(planes_ZYX.shape[1:], spacing[1:],
                                                                           strict=True))) / step) + 2  # fmt: skip
        offsets_T = (torch.arange(2 * half + 1, device=patch_DHW.device, dtype=torch.float32) - half) * step
        angles = [math.pi * view / _VIEWS for view in range(_VIEWS)]
        paths = [torch.stack([piece.path(axes[0][shown], offsets_T, a) for a in angles], dim=1) for piece in pieces]
        path_ZVT = torch.stack(paths).sum(dim=0)
        noise_ZVT = rng.standard_normal(tuple(path_ZVT.shape), dtype=np.float32) * np.float32(self.noise * rng.random())
        error_ZVT = _measured_error(path_ZVT, torch.from_numpy(noise_ZVT).to(path_ZVT))
        image_ZYX = _back_projected(error_ZVT, axes[1], axes[2], angles, step, half)
        streaks_ZYX = torch.zeros_like(planes_ZYX)
        streaks_ZYX[shown] = image_ZYX / _WATER * (1000 / self.frame.hu_width) * float(rng.uniform(0.3, 1))
        metal_ZYX = torch.stack([piece.inside(*axes) for piece in pieces]).any(dim=0)
        changed = torch.where(metal_ZYX, torch.ones_like(planes_ZYX), planes_ZYX + streaks_ZYX)
        return changed.permute([order.index(axis) for axis in range(3)]).contiguous()

    @staticmethod
    def _planes(pieces: Sequence[_Ellipsoid], count: int, step: float) -> slice:
        """Returns the planes that a piece of metal may lie in."""
        low = min(piece.centre[0] - piece.radii[0] for piece in pieces) / step + (count - 1) / 2
        high = max(piece.centre[0] + piece.radii[0] for piece in pieces) / step + (count - 1) / 2
        return slice(max(math.floor(low), 0), max(min(math.ceil(high) + 1, count), 0))


@dataclass(frozen=True)
class _Ellipsoid:
    """A piece of metal: centre and radii (z, y, x) in mm from the patch's centre."""

    centre: tuple[float, ...]
    radii: tuple[float, ...]

    def inside(self, z: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Returns the voxels inside, bool (Z, Y, X)."""
        parts = [((axis - c) / r) ** 2 for axis, c, r in zip((z, y, x), self.centre, self.radii, strict=True)]
        return parts[0][:, None, None] + parts[1][:, None] + parts[2] <= 1

    def path(self, z: Tensor, offsets_T: Tensor, angle: float) -> Tensor:
        """Returns the length (Z, T) in mm of the rays x cos θ + y sin θ = t through the piece, in each plane."""
        (cz, cy, cx), (rz, ry, rx) = self.centre, self.radii
        shrink_Z1 = (1 - ((z - cz) / rz) ** 2).clamp(min=0)[:, None]  # squared, of the ellipse in that plane
        squared = (rx * math.cos(angle)) ** 2 + (ry * math.sin(angle)) ** 2
        away_T = offsets_T - (cx * math.cos(angle) + cy * math.sin(angle))
        root_ZT = (squared * shrink_Z1 - away_T**2).clamp(min=0).sqrt()
        return 2 * rx * ry / squared * root_ZT


def _measured_error(path_ZVT: Tensor, noise_ZVT: Tensor) -> Tensor:
    """Returns what is measured beyond the attenuation of one mean energy, on rays that meet metal."""
    materials = list(zip(_SPECTRUM, _TITANIUM, strict=True))
    mean = sum(weight * mu for weight, mu in materials)
    passed = torch.stack([weight * torch.exp(-mu * path_ZVT) for weight, mu in materials]).sum(dim=0)
    attenuation = -torch.log(passed)
    # The variance of a logarithm of n photons is 1 / n.
    error = attenuation - mean * path_ZVT + noise_ZVT * torch.exp(attenuation / 2)
    return torch.where(path_ZVT > 0, error, torch.zeros_like(error))


def _back_projected(error_ZVT: Tensor, y: Tensor, x: Tensor, angles: Sequence[float], step: float, half: int) -> Tensor:
    """Returns the filtered back-projection (Z, Y, X), in attenuation per mm; planes without metal are 0."""
    steps = torch.arange(-2 * half, 2 * half + 1, device=error_ZVT.device, dtype=torch.float32)
    odd = -1 / (math.pi * step * steps.abs().clamp(min=1)) ** 2
    ramp = torch.where(steps.remainder(2) == 1, odd, torch.zeros_like(steps))
    ramp[2 * half] = 1 / (2 * step) ** 2
    size = 2 * half + 1
    # Row t of the Toeplitz matrix holds ramp[t − t′].
    toeplitz = torch.stack([ramp[2 * half - t : 2 * half - t + size] for t in range(size)])
    filtered_ZVT = step * torch.matmul(error_ZVT, toeplitz)
    image = torch.zeros(error_ZVT.shape[0], len(y), len(x), device=error_ZVT.device)
    for view, angle in enumerate(angles):
        place_YX = (x[None] * math.cos(angle) + y[:, None] * math.sin(angle)) / step + half
        first_YX = place_YX.floor().clamp(0, size - 2)
        share_YX = place_YX - first_YX
        low = first_YX.long()
        line_ZT = filtered_ZVT[:, view]
        image = image + line_ZT[:, low] * (1 - share_YX) + line_ZT[:, low + 1] * share_YX
    return image * (math.pi / len(angles))
