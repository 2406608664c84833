"""What a scanner adds to an image: blur, thick slices, noise, streaks, a table."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def scan(rng: np.random.Generator, hu: np.ndarray, body: np.ndarray, spacing: float) -> np.ndarray:
    """Returns the image as a scanner would show it.

    Args:
        rng: Source of all randomness.
        hu: float32 (i, j, k), RAS.
        body: Mask (i, j, k).
        spacing: Voxel side in mm.

    The steps are a table, partial volume by a blur across the plane and along the axis (slices of up to 8 mm),
    correlated noise whose standard deviation grows with the width of the body, and horizontal streaks where the body
    attenuates most. All numbers are our choice.
    """
    image = hu.copy()
    if rng.random() < 0.7:
        _add_table(rng, image, body, spacing)
    in_plane = rng.uniform(0.5, 1.3) / spacing
    along = rng.choice([0.8, 1.5, 2.5, 3.5]) * rng.uniform(0.7, 1.1) / spacing
    image = ndimage.gaussian_filter(image, (in_plane, in_plane, along))
    sigma = float(np.exp(rng.uniform(np.log(4), np.log(45))))
    image += sigma * _grain(rng, image.shape, rng.uniform(0.3, 1.0))
    if rng.random() < 0.4:
        _add_streaks(rng, image, body)
    return np.clip(image, -1024, 3071).astype(np.float32)


def _grain(rng: np.random.Generator, shape: tuple[int, ...], width: float) -> np.ndarray:
    """Returns correlated noise of standard deviation 1; `width` is that of the correlation, in voxels."""
    grain = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), width)
    return grain / max(float(grain[::4, ::4, ::4].std()), 1e-6)


def _add_table(rng: np.random.Generator, image: np.ndarray, body: np.ndarray, spacing: float) -> None:
    """Draws a curved table of two thin plates behind the body."""
    columns = np.flatnonzero(body.any(axis=(0, 2)))
    if not len(columns):
        return
    back = int(columns[0])
    x = np.arange(image.shape[0]) - image.shape[0] / 2
    curve = rng.uniform(0, 0.0012) * spacing
    half, thickness, plate = rng.uniform(180, 260) / spacing, rng.uniform(15, 60) / spacing, rng.uniform(-700, 200)
    for depth in (0.0, thickness):
        for i in np.flatnonzero(np.abs(x) < half):
            j = int(back - 1 - depth + curve * x[i] ** 2)
            if 0 <= j < image.shape[1]:
                free = ~body[i, j]
                image[i, j, free] = plate


def _add_streaks(rng: np.random.Generator, image: np.ndarray, body: np.ndarray) -> None:
    """Adds noise that runs from left to right, in the planes where the sum of dense tissue is large."""
    dense = np.where(body, np.clip(image + 1000, 0, 2500), 0).sum(axis=0).max(axis=0)
    share = np.clip((dense / max(float(dense.max()), 1.0) - 0.75) / 0.25, 0, 1) ** 2
    rows = ndimage.gaussian_filter(rng.standard_normal(image.shape, dtype=np.float32), (30, 0.7, 0.5))
    rows /= max(float(rows[::4, ::4, ::4].std()), 1e-6)
    image += rows * (rng.uniform(5, 35) * share).astype(np.float32) * body
