"""Voxels that are put into the order of another grid."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mome.volumes import Grid, Volume
from mome.volumes.reordered import reordered

ARRAY = np.arange(2 * 3 * 4).reshape(2, 3, 4)


def turned(degrees: float, axis: int = 2) -> np.ndarray:
    """Returns the affine of voxels of 1, 1.5 and 2 mm that are turned around one axis."""
    affine, angle = np.eye(4), np.deg2rad(degrees)
    first, second = (other for other in range(3) if other != axis)
    affine[[first, first, second, second], [first, second, first, second]] = (
        np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle),
    )  # fmt: skip
    affine[:3, :3] *= (1, 1.5, 2)
    affine[:3, 3] = (10, -20, 30)
    return affine


@pytest.mark.parametrize("degrees", [0, 30, 44.9, 45, 60, 170])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_order_comes_back_on_oblique_grids(degrees: float, axis: int) -> None:
    affine = turned(degrees, axis)
    grid = Grid(ARRAY.shape, affine)
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((False, True), repeat=3):
            array = ARRAY.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
            there = affine[:, [*order, 3]].copy()
            for i, flip in enumerate(flips):
                if flip:
                    there[:3, 3] += (array.shape[i] - 1) * there[:3, i]
                    there[:3, i] *= -1
            found = reordered(Volume(array, there), grid)
            assert np.array_equal(found.array, ARRAY) and grid.same_as(found.grid)


def test_rounding_at_45_degrees_exchanges_no_axes() -> None:
    """The letters of both grids differ there; a label map with the affine of its scan was refused."""
    scan, labels = Grid(ARRAY.shape, turned(45 - 1e-5)), Volume(ARRAY, turned(45 + 1e-5))
    assert scan.orientation != labels.grid.orientation and scan.same_as(labels.grid)
    found = reordered(labels, scan)
    assert np.array_equal(found.array, ARRAY) and scan.same_as(found.grid)
