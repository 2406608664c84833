"""Augmentation of training patches: left-right mirroring, rotation and zoom, intensity, noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from mome.labels import load_table
from mome.typed import check_range


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Probabilities and ranges. Our choice.

    Args:
        mirror: Probability of a left-right flip; left and right structures exchange their labels.
        affine: Probability of a rotation and zoom.
        rotate: Largest angle about each axis, in degrees.
        zoom: Largest relative zoom, as in 0.15 for 85 % to 115 %.
        intensity: Largest relative change of contrast; the brightness shifts by up to half of it.
        noise: Largest standard deviation of the noise; 1 is the width of the HU window.
        gamma: Largest exponent of a gamma curve, or its inverse, as in 1.5; 1 changes nothing.
        blur: Probability of a blur by up to one voxel along each axis, as thick slices and smooth kernels give.
        slab: Probability that the patch becomes a slab of random height with air above and below it, as short scans
            are padded in inference.

    Raises:
        InputError: A value is outside its range.
    """

    mirror: float = 0.5
    affine: float = 0.0
    rotate: float = 10.0
    zoom: float = 0.15
    intensity: float = 0.1
    noise: float = 0.05
    gamma: float = 1.0
    blur: float = 0.0
    slab: float = 0.0

    def __post_init__(self) -> None:
        owner = "augmentation"
        check_range(owner, 0, 1, mirror=self.mirror, affine=self.affine, intensity=self.intensity, noise=self.noise)
        check_range(owner, 0, 1, blur=self.blur, slab=self.slab)
        check_range(owner, 1, 5, gamma=self.gamma)
        check_range(owner, 0, 180, rotate=self.rotate)
        check_range(owner, 0, 0.9, zoom=self.zoom)  # at 1, the smallest patch would have no extent


class Augmentation:
    """Augments one patch. All randomness comes from the generator of the call.

    Args:
        config: See `AugmentationConfig`.
        names: Labels in the order of the targets' P axis.
        left_right_axis: Axis of the patch along which left and right lie, as in 0 on a RAS grid.
        height_axis: Axis of the patch that runs along the body, as in 2 on a RAS grid.

    Attributes:
        can_mirror: False if one structure of a left-right pair is trained without the other. A mirrored patch would
            show the missing one under the wrong label, so no patch is mirrored then.
    """

    def __init__(
        self, config: AugmentationConfig, names: Sequence[str], left_right_axis: int = 0, height_axis: int = 2
    ) -> None:
        self.config, self.left_right_axis, self.height_axis = config, left_right_axis, height_axis
        table = load_table()
        partners = {name: table[name].mirror or name for name in names}
        self.can_mirror = all(partner in partners for partner in partners.values())
        self.mirrored_order = [list(names).index(partners[name]) for name in names] if self.can_mirror else []

    def __call__(
        self, rng: np.random.Generator, patch: np.ndarray, targets: np.ndarray, supervised: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns an augmented copy of one patch.

        Args:
            rng: Source of all randomness.
            patch: (D, H, W) float32 in [0, 1], the HU window.
            targets: (P, D, H, W) bool, one mask per label.
            supervised: (P,) bool, which labels are annotated in this case.
        """
        config = self.config
        if self.can_mirror and rng.random() < config.mirror:
            patch = np.flip(patch, self.left_right_axis)
            targets = np.flip(targets[self.mirrored_order], self.left_right_axis + 1)
            supervised = supervised[self.mirrored_order]
        if rng.random() < config.affine:
            patch, targets = self._rotate_and_zoom(rng, patch, targets)
        if config.gamma > 1:
            patch = patch ** np.float32(config.gamma ** rng.uniform(-1, 1))
        if config.blur > 0 and rng.random() < config.blur:
            patch = ndimage.gaussian_filter(patch, rng.uniform(0, 1, 3))
        contrast = 1 + config.intensity * rng.uniform(-1, 1)
        patch = (patch - 0.5) * np.float32(contrast) + np.float32(0.5 + config.intensity * rng.uniform(-0.5, 0.5))
        sigma = config.noise * rng.random()
        if sigma > 0:
            patch = patch + np.float32(sigma) * rng.standard_normal(patch.shape, dtype=np.float32)
        patch = np.clip(patch, 0, 1)
        if config.slab > 0 and rng.random() < config.slab:
            patch, targets = self._cut_slab(rng, patch, targets)
        return patch, targets, supervised

    def _cut_slab(
        self, rng: np.random.Generator, patch: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Replaces all but a slab of an eighth to the whole of the patch's height by air (0)."""
        side = patch.shape[self.height_axis]
        height = int(rng.integers(max(side // 8, 1), side + 1))
        start = int(rng.integers(side - height + 1))
        planes = np.arange(side)
        inside = (planes >= start) & (planes < start + height)
        shape = [1, 1, 1]
        shape[self.height_axis] = side
        inside = inside.reshape(shape)
        return patch * inside, targets & inside

    def _rotate_and_zoom(
        self, rng: np.random.Generator, patch: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Resamples patch and targets linearly under one random rotation and zoom; outside lies air (0)."""
        angles = np.deg2rad(rng.uniform(-self.config.rotate, self.config.rotate, 3))
        matrix = np.eye(3)
        for axis, angle in enumerate(angles):
            a, b = [i for i in range(3) if i != axis]
            rotation = np.eye(3)
            rotation[[a, b], [a, b]] = np.cos(angle)
            rotation[a, b], rotation[b, a] = -np.sin(angle), np.sin(angle)
            matrix = matrix @ rotation
        matrix = matrix * (1 + self.config.zoom * rng.uniform(-1, 1))
        theta = torch.from_numpy(np.concatenate([matrix, np.zeros((3, 1))], axis=1)).float()[None]
        grid = F.affine_grid(theta, [1, 1, *patch.shape], align_corners=False)
        stacked = torch.from_numpy(np.concatenate([patch[None], targets.astype(np.float32)]))[None]
        moved = F.grid_sample(stacked, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0].numpy()
        return moved[0], moved[1:] > 0.5
