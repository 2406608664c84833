"""Surface metrics beside Google DeepMind's `surface-distance`: the same areas, and the same numbers from them."""

from __future__ import annotations

import numpy as np
import pytest
from surface_distance import (
    compute_robust_hausdorff,
    compute_surface_dice_at_tolerance,
    compute_surface_distances,
    lookup_tables,
)

from mome.metrics import hausdorff95, normalized_surface_dice
from mome.metrics.surface import _areas

SPACINGS = [(1.0, 1.0, 1.0), (3.9, 3.9, 2.5), (0.7, 0.9, 5.0)]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_areas_of_all_corner_patterns(spacing: tuple[float, float, float]) -> None:
    theirs = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
    for code in range(256):
        corners = ((code >> np.arange(8)) & 1).reshape(2, 2, 2)
        their_code = int((lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL * corners).sum())
        assert _areas(spacing)[code] == pytest.approx(theirs[their_code], rel=0, abs=1e-12)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((14, 15, 16)) > 0.6


def thin_tube(seed: int) -> np.ndarray:
    """A line of voxels that steps along diagonals, one voxel thick."""
    rng, at = np.random.default_rng(seed), np.array([2, 2, 2])
    mask = np.zeros((24, 24, 24), bool)
    while (at < 22).all():
        mask[tuple(at)] = True
        at = at + rng.integers(0, 2, 3)
    return mask


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("make", [noise, thin_tube])
def test_rough_masks_have_the_same_metrics(make, spacing: tuple[float, float, float]) -> None:
    prediction, reference = make(0), make(1)
    distances = compute_surface_distances(reference, prediction, spacing)
    for tolerance in (0.5, 1.0, 3.0):
        theirs = compute_surface_dice_at_tolerance(distances, tolerance)
        assert normalized_surface_dice(prediction, reference, spacing, tolerance) == pytest.approx(theirs, abs=1e-12)
    theirs = compute_robust_hausdorff(distances, 95)
    assert hausdorff95(prediction, reference, spacing) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("rounding", [-6e-8, 0, 6e-8])
def test_rounding_of_a_header_decides_nothing(rounding: float) -> None:
    """The spacing of a turned scan is 2.00000005 mm, say; surfaces exactly 2 mm apart then counted as too far away."""
    reference = np.zeros((12, 12, 12), bool)
    reference[3:9, 3:9, 3:9] = True
    prediction, spacing = np.roll(reference, 1, 2), (1.0, 1.0, 2.0 * (1 + rounding))
    assert normalized_surface_dice(prediction, reference, spacing, 2.0) == 1
    assert normalized_surface_dice(prediction, reference, spacing, 1.999) < 0.9
