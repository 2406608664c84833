"""Augmentation of patches: mirroring that knows left from right, zoom and rotation, intensity, noise, blur."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from mome.labels import load_table


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Probabilities and ranges.

    Args:
        mirror: Probability of a left-right flip, in which paired labels change places.
        affine: Probability of a rotation and zoom.
        rotate: Largest angle in degrees.
        zoom: Largest relative zoom.
        intensity: Largest shift and relative contrast change of the window.
        noise: Largest standard deviation of the noise.
    """

    mirror: float = 0.5
    affine: float = 0.0
    rotate: float = 10.0
    zoom: float = 0.15
    intensity: float = 0.1
    noise: float = 0.05


class Augmentation:
    """Callable on one patch; all randomness comes from the generator it is given.

    Args:
        config: See `AugmentationConfig`.
        names: Labels in the order of the targets' axis.
        left_right_axis: Axis of the patch along which left and right lie (0 on an R… or L… grid).
    """

    def __init__(self, config: AugmentationConfig, names: Sequence[str], left_right_axis: int = 0) -> None:
        self.config, self.axis = config, left_right_axis
        table = load_table()
        mirrors = {name: table[name].mirror or name for name in names}
        # A structure whose partner is not trained has nowhere to go: then no patch may be mirrored.
        self.can_mirror = all(partner in mirrors for partner in mirrors.values())
        self.order = [list(names).index(mirrors[name]) for name in names] if self.can_mirror else []

    def __call__(
        self, rng: np.random.Generator, patch: np.ndarray, targets: np.ndarray, supervised: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Patch (D, H, W) in [0, 1], targets (P, D, H, W), supervised (P,) → the same, changed."""
        config = self.config
        if self.can_mirror and rng.random() < config.mirror:
            patch = np.flip(patch, self.axis)
            targets = np.flip(targets[self.order], self.axis + 1)
            supervised = supervised[self.order]
        if rng.random() < config.affine:
            patch, targets = self._affine(rng, patch, targets)
        contrast = 1 + config.intensity * rng.uniform(-1, 1)
        patch = (patch - 0.5) * np.float32(contrast) + np.float32(0.5 + config.intensity * rng.uniform(-0.5, 0.5))
        sigma = config.noise * rng.random()
        if sigma > 0:
            patch = patch + np.float32(sigma) * rng.standard_normal(patch.shape, dtype=np.float32)
        return np.clip(patch, 0, 1), targets, supervised

    def _affine(
        self, rng: np.random.Generator, patch: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        angles = np.deg2rad(rng.uniform(-self.config.rotate, self.config.rotate, 3))
        matrix = np.eye(3)
        for axis, angle in enumerate(angles):
            a, b = [i for i in range(3) if i != axis]
            turn = np.eye(3)
            turn[[a, b], [a, b]] = np.cos(angle)
            turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
            matrix = matrix @ turn
        matrix = matrix * (1 + self.config.zoom * rng.uniform(-1, 1))
        theta = torch.from_numpy(np.concatenate([matrix, np.zeros((3, 1))], axis=1)).float()[None]
        grid = F.affine_grid(theta, [1, 1, *patch.shape], align_corners=False)
        both = torch.from_numpy(np.concatenate([patch[None], targets.astype(np.float32)]))[None]
        moved = F.grid_sample(both, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0].numpy()
        return moved[0], moved[1:] > 0.5
