"""Random elastic and affine deformations of an anatomy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def deformation(
    rng: np.random.Generator,
    shape: Sequence[int],
    spacing: float,
    source_centre: Sequence[float],
    organs: Sequence[tuple[Sequence[float], float]],
    strength: float = 1.0,
) -> Tensor:
    """Draws a deformation, as the place in the source that every voxel of the result shows.

    It joins a rotation, a zoom of each axis, a smooth displacement (control points 70 mm and 35 mm apart), and a local
    growth or shrinkage of organs. All ranges are our choice.

    Args:
        rng: Source of all randomness.
        shape: Voxels (i, j, k) of the result.
        spacing: Voxel side in mm of both grids.
        source_centre: Voxel of the source that the centre of the result shows, before displacement.
        organs: Centre (voxels of the source) and radius (mm) of each organ that grows or shrinks.
        strength: Scales all ranges; 0 gives a plain crop.

    Returns:
        float32 (i, j, k, 3), voxels of the source.
    """
    axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in shape]
    offset = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    offset += _smooth_noise(rng, shape, 70 / spacing, 9.0 * strength / spacing)
    offset += _smooth_noise(rng, shape, 35 / spacing, 3.0 * strength / spacing)
    place = offset @ torch.from_numpy(_matrix(rng, strength)).float().T
    place += torch.tensor([float(c) for c in source_centre])
    for centre, radius in organs:
        away = place - torch.tensor([float(c) for c in centre])
        reach = max(radius, 15.0) / spacing
        bump = torch.exp(-(away**2).sum(-1, keepdim=True) / (2 * reach**2))
        place += away * bump * float(rng.uniform(-0.3, 0.3) * strength)
        place += bump * torch.from_numpy(rng.normal(0, 5.0 * strength / spacing, 3)).float()
    return place


def warp(array: np.ndarray, place: Tensor, mode: str, fill: float) -> np.ndarray:
    """Returns the array as the deformation shows it.

    Args:
        array: (i, j, k).
        place: From `deformation`.
        mode: `nearest` or `bilinear`.
        fill: Value outside the array.

    Returns:
        float32 (i, j, k).
    """
    sides = torch.tensor([max(n - 1, 1) for n in array.shape], dtype=torch.float32)
    grid = (place / sides * 2 - 1).flip(-1)[None]  # grid_sample wants the last axis first
    source = torch.from_numpy(array.astype(np.float32) - np.float32(fill))[None, None]
    moved = F.grid_sample(source, grid, mode=mode, padding_mode="zeros", align_corners=True)
    return (moved[0, 0] + fill).numpy()


def _matrix(rng: np.random.Generator, strength: float) -> np.ndarray:
    """Returns a random rotation of up to 10° about each axis and a zoom of up to 18 %, by a further 8 % per axis."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(10 * strength * rng.uniform(-1, 1, 3))):
        a, b = [i for i in range(3) if i != axis]
        rotation = np.eye(3)
        rotation[[a, b], [a, b]] = np.cos(angle)
        rotation[a, b], rotation[b, a] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ rotation
    zoom = (1 + 0.18 * strength * rng.uniform(-1, 1)) * (1 + 0.08 * strength * rng.uniform(-1, 1, 3))
    return matrix * zoom


def _smooth_noise(rng: np.random.Generator, shape: Sequence[int], distance: float, sigma: float) -> Tensor:
    """Returns a smooth random vector field (i, j, k, 3); `distance` is between control points, both in voxels."""
    points = [max(int(np.ceil(n / distance)) + 1, 2) for n in shape]
    control = torch.from_numpy(rng.normal(0, 1, (1, 3, *points)).astype(np.float32)) * sigma
    field = F.interpolate(control, size=tuple(shape), mode="trilinear", align_corners=True)
    return field[0].permute(1, 2, 3, 0)
