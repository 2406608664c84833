"""Previews of scans of unusual sizes: thin slabs, and long scans that have more voxels than a picture can show."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mome.viz import preview
from mome.volumes import Grid


@pytest.mark.parametrize("shape, spacing", [((512, 512, 1000), (0.9, 0.9, 2.0)), ((40, 40, 300), (9.0, 9.0, 12.0))])
def test_the_grid_of_a_picture_is_bounded(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    """A scan of the whole body had 500 million voxels, and every mask was resampled to them twice."""
    scan = Grid(shape, np.diag([*spacing, 1.0]))
    grid = preview.picture_grid(scan)
    assert math.prod(grid.shape) <= 40_000_000 and grid.orientation == "LAS"
    assert np.ptp(grid.spacing) < 1e-6
    extents = sorted(np.multiply(scan.shape, scan.spacing))
    assert np.allclose(sorted(np.multiply(grid.shape, grid.spacing)), extents, atol=2 * max(grid.spacing))


def test_a_small_scan_keeps_its_own_steps() -> None:
    assert preview.picture_grid(Grid((60, 50, 40), np.diag([2.0, 2, 3, 1]))).spacing == pytest.approx((2, 2, 2))


def test_a_thin_frame_is_widened_around_its_centre() -> None:
    """The letters S and I lay on the planes of a slab, and S on the title."""
    assert preview._widened((0, 300, 10, 20)) == pytest.approx((0, 300, -35, 65))
    assert preview._widened((0, 10, 0, 300)) == pytest.approx((-45, 55, 0, 300))
    assert preview._widened((5, 105, 5, 85)) == (5, 105, 5, 85)
