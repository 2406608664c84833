"""Scans that are turned against the patient are segmented on an upright grid; what that saves changes no mask."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from orientation_runs import orientations, stored, tilted_grid, turned
from scipy.spatial.transform import Rotation
from stand_in_models import Contrast

from mome.errors import InputError
from mome.inference import Segmenter
from mome.inference.above import AboveThreshold
from mome.inference.loaded_scan import load_scan
from mome.inference.planes import SlantedStream, plane_stream
from mome.inference.scan_grid import scan_grid
from mome.inference.scan_tiles import tiles_of_scan
from mome.inference.stream import wanted_tiles
from mome.inference.tiles import tile_steps
from mome.processing import MoMEProcessor
from mome.volumes import Grid, Volume, network_grid, resample
from mome.volumes.upright import rotation_degrees, upright_grid

SHAPE, AFFINE = (30, 26, 34), np.diag([-2.0, -1.5, 3.0, 1.0])


@pytest.mark.parametrize(("axes", "flips"), list(orientations())[::5])
def test_the_angle_is_that_of_the_rotation(axes: tuple, flips: tuple) -> None:
    array = np.zeros(SHAPE, np.float32)
    for angle in (0.0, 0.01, 3.0, 20.0, 40.0):
        other, affine = stored(array, turned(AFFINE, SHAPE, angle), axes, flips)
        assert rotation_degrees(Grid(other.shape, affine)) == pytest.approx(angle, abs=1e-6)
    # a tilt moves one axis of three, so the nearest rotation is half of it
    tilted = Grid(SHAPE, tilted_grid(AFFINE, SHAPE, 24))
    assert rotation_degrees(tilted) == pytest.approx(12, abs=1e-6)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SAR"])
def test_the_upright_grid_covers_the_scan_and_is_no_larger(orientation: str) -> None:
    grid = Grid(SHAPE, turned(AFFINE, SHAPE, 25))
    found = upright_grid(grid, spacing=(2.0, 1.5, 3.0), orientation=orientation)
    assert found.orientation == orientation and np.count_nonzero(found.affine[:3, :3]) == 3
    assert rotation_degrees(found) == 0
    faces = np.array([[i, j, k, 1] for i in (-0.5, 29.5) for j in (-0.5, 25.5) for k in (-0.5, 33.5)])
    at = (faces @ (np.linalg.inv(found.affine) @ grid.affine).T)[:, :3]
    beyond_low, beyond_high = at.min(axis=0) + 0.5, found.shape - at.max(axis=0) - 0.5
    assert (beyond_low > -1e-2).all() and (beyond_high > -1e-2).all() and (beyond_low + beyond_high < 1).all()
    same = upright_grid(Grid(SHAPE, AFFINE), spacing=(2.0, 1.5, 3.0), orientation="LPS")
    assert same.same_as(Grid(SHAPE, AFFINE))


def test_scans_that_are_turned_little_keep_their_rotation() -> None:
    processor = MoMEProcessor(spacing=[3, 3, 3])
    for angle, is_kept in ((0, True), (9.9, True), (10.1, False)):
        grid = Grid(SHAPE, turned(AFFINE, SHAPE, angle))
        assert processor.network_grid(grid).same_as(network_grid(grid, spacing=(3, 3, 3))) == is_kept
        assert rotation_degrees(processor.network_grid(grid)) > 9 if angle == 9.9 else True
    with pytest.raises(InputError, match="turned scan has .* the limit is"):
        MoMEProcessor(spacing=[0.02] * 3).network_grid(Grid((512,) * 3, turned(AFFINE, (512,) * 3, 20)))


@pytest.mark.parametrize("spacing", [1.0, 4.0])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_blocks_of_an_oblique_grid_give_the_same_voxels(spacing: float, mode: str, monkeypatch) -> None:
    array = np.random.default_rng(0).standard_normal((2, *SHAPE))
    source = Grid(SHAPE, turned(AFFINE, SHAPE, 30))
    target = upright_grid(source, spacing=(spacing, spacing, spacing))
    module = sys.modules["mome.volumes.resampling"]
    monkeypatch.setattr(module, "_OBLIQUE_SIDE", 1000)
    whole = resample(array, source, target, mode=mode, fill=-7.0)
    monkeypatch.setattr(module, "_OBLIQUE_SIDE", 5)
    torch.testing.assert_close(resample(array, source, target, mode=mode, fill=-7.0), whole, rtol=1e-9, atol=1e-9)
    outside = (whole == -7.0).float().mean()
    assert 0.3 < float(outside) < 0.8


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("move", [turned, tilted_grid])
def test_slanted_pieces_are_the_whole(axis: int, move: Callable) -> None:
    """Every voxel of the scan is in one piece, with the value that it has when all logits are resampled at once."""
    scan = Grid((60, 55, 50), move(np.diag([2.0, 2.0, 2.0, 1.0]), (60, 55, 50), 30))
    network = upright_grid(scan, spacing=(3.0, 3.0, 3.0))
    logits = torch.from_numpy(np.random.default_rng(0).standard_normal(network.shape).astype(np.float32))
    logits = torch.nn.functional.avg_pool3d(logits[None], 3, 1, 1)[0]
    expected = resample(logits, network, scan, fill=-30.0, antialias=False).numpy()
    stream, seen = plane_stream(network, scan, axis), np.zeros(scan.shape, int)
    assert isinstance(stream, SlantedStream)
    for first in range(0, network.shape[axis], 7):
        ready = stream.push(first, logits[None].narrow(1 + axis, first, min(7, network.shape[axis] - first)))
        above = AboveThreshold(ready.source, ready.target, stream.axis, 0.1, ready.between)
        for corner, values in above.blocks(ready.logits[0], lambda values: values > 0.1):
            seen[tuple(slice(a, a + n) for a, n in zip(corner, values.shape, strict=True))] += values
    assert seen.max() == 1 and (seen > 0).sum() > 1000
    assert np.array_equal(seen > 0, expected > 0.1)


@pytest.mark.parametrize(("axis", "degrees"), [(2, 15), (0, 12), (1, 40)])
@pytest.mark.parametrize(("scan_mm", "network_mm"), [(1.1, 1.1), (2.4, 0.8)])
def test_slices_on_network_planes_belong_to_exactly_one_piece(
    axis: int, degrees: float, scan_mm: float, network_mm: float
) -> None:
    """A scan that is turned in its planes has slices on network planes, where rounding decides between two pieces."""
    rng = np.random.default_rng(0)
    shape = [4, 5, 6]
    shape[axis] = 40
    for origin in rng.uniform(-300, 300, (6, 3)).round(3):
        affine = np.eye(4)
        angles = [0.0, 0.0, 0.0]
        angles[axis] = degrees
        affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * scan_mm
        affine[:3, 3] = origin
        scan = Grid((shape[0], shape[1], shape[2]), affine)
        network = upright_grid(scan, spacing=(network_mm,) * 3)
        stream, found = plane_stream(network, scan, axis), np.zeros(shape, dtype=int)
        for first in range(0, network.shape[axis], 7):
            sides = list(network.shape)
            sides[axis] = min(7, network.shape[axis] - first)
            ready = stream.push(first, torch.ones(1, *sides))
            assert ready is not None
            above = AboveThreshold(ready.source, ready.target, stream.axis, part=ready.between)
            for corner, positive in above.blocks(ready.logits[0], lambda logits: logits > 0):
                place = tuple(slice(at, at + side) for at, side in zip(corner, positive.shape, strict=True))
                found[place] += positive
        assert (found == 1).all(), f"{(found == 0).sum()} voxels in no piece, {(found > 1).sum()} in two"


def test_tiles_beside_the_scan_are_left_out_and_change_nothing(monkeypatch) -> None:
    hu = np.random.default_rng(1).normal(0, 60, (60, 20, 60)).astype(np.float32)
    scan = Volume(hu, turned(np.diag([2.0, 2.0, 2.0, 1.0]), hu.shape, 40))
    processor = MoMEProcessor(spacing=[2, 2, 2], hu_window=[-100, 100])
    segmenter = Segmenter(Contrast(), processor, exact=True)
    found = segmenter.segment(scan, ["liver", "spleen"], probabilities=True)
    assert found.tiles[0] < 0.9 * found.tiles[1]
    monkeypatch.setattr("mome.inference.loaded_scan.tiles_of_scan", lambda *grids: None)
    every = segmenter.segment(scan, ["liver", "spleen"], probabilities=True)
    assert every.tiles[0] == every.tiles[1]
    for name in found.masks:
        assert np.array_equal(found.masks[name], every.masks[name]) and found.masks[name].any()
        assert np.array_equal(found.masks[name], found.probabilities[name] >= 128)
        assert np.array_equal(found.probabilities[name], every.probabilities[name])
        assert found.masks.voxels[name] == found.masks[name].sum()
        assert np.array_equal(found.masks.sampled(name, 3), found.masks[name][::3, ::3, ::3].astype(bool))
    network = processor.network_grid(scan.grid)
    wanted, steps = tiles_of_scan(network, scan.grid), tile_steps(network.shape, (16,) * 3, 0.5)
    assert wanted is not None and len(wanted_tiles(network.shape, (16,) * 3, steps, wanted)) == found.tiles[0]
    assert tiles_of_scan(network_grid(scan.grid, spacing=(2, 2, 2)), scan.grid) is None


def patient_in_air(degrees: float = 25.0, noise: float = 20.0, lung: float = -860.0) -> tuple[Volume, np.ndarray]:
    """A cylinder in noisy air, of water and at one end a lung that nothing covers; turned. And where it is."""
    i, j, k = np.meshgrid(*map(np.arange, (100, 90, 60)), indexing="ij")
    inside = (((i - 55) / 20) ** 2 + ((j - 40) / 14) ** 2 < 1) & (k > 8) & (k < 50)
    hu = np.random.default_rng(0).normal(-1000, noise, inside.shape).astype(np.float32)
    hu[inside] = np.where(k > 35, lung, 40)[inside]
    return Volume(hu, turned(np.diag([4.0, 4.0, 4.0, 1.0]), hu.shape, degrees)), inside


def test_the_grid_of_a_turned_scan_is_around_the_patient() -> None:
    processor = MoMEProcessor(spacing=[4, 4, 4])
    scan, inside = patient_in_air()
    whole, found = processor.network_grid(scan.grid), scan_grid(scan, processor)
    assert np.prod(found.shape) < 0.3 * np.prod(whole.shape)
    # Its voxels are those of the whole grid.
    start = (np.linalg.inv(whole.affine) @ found.affine)[:3, 3]
    assert np.allclose(found.affine[:3, :3], whole.affine[:3, :3]) and np.allclose(start, start.round(), atol=1e-6)
    # The patient is in it, with what is 12 mm around, and no more than 24 mm are.
    to_found = np.linalg.inv(found.affine) @ scan.affine
    at = np.argwhere(inside) @ to_found[:3, :3].T + to_found[:3, 3]
    for beside in (at.min(axis=0), np.asarray(found.shape) - 1 - at.max(axis=0)):
        assert (beside >= 12 / 4).all() and (beside <= 24 / 4).all()
    # Both modes use it.
    assert load_scan(scan, processor).network.same_as(found)
    default = load_scan(scan, processor, patch=(16, 16, 16))
    assert default.whole.same_as(found) and np.prod(default.network.shape) <= np.prod(found.shape)


def test_a_turned_scan_keeps_its_whole_grid_where_no_patient_is_found() -> None:
    processor = MoMEProcessor(spacing=[4, 4, 4])
    for noise in (0.0, 400.0):  # with such noise, air is one piece that is denser than air
        scan, inside = patient_in_air(noise=noise)
        if not noise:
            scan.array[inside] = -1000
        assert scan_grid(scan, processor).same_as(processor.network_grid(scan.grid))
    straight, _ = patient_in_air(degrees=9)
    assert scan_grid(straight, processor).same_as(network_grid(straight.grid, spacing=(4, 4, 4)))


def test_masks_around_the_patient_are_those_of_the_whole_grid(monkeypatch) -> None:
    """A network that looks at one voxel has the same masks on both grids, of a lung that nothing covers, too."""
    scan, inside = patient_in_air()
    model = Contrast(("liver", "lung_left"), (0.8, 0.06))  # above 40 − 220 HU and above −934 HU
    segmenter = Segmenter(model, MoMEProcessor(spacing=[4, 4, 4], hu_window=[-1000, 100]), exact=True)
    found = segmenter.segment(scan, ["liver", "lung_left"])
    monkeypatch.setattr(
        "mome.inference.loaded_scan.scan_grid", lambda scan, processor: processor.network_grid(scan.grid)
    )
    every = segmenter.segment(scan, ["liver", "lung_left"])
    assert found.tiles[0] < 0.7 * every.tiles[0]
    for name in found.masks:
        assert np.array_equal(found.masks[name], every.masks[name]) and found.masks[name].any()
    assert (found.masks["lung_left"].astype(bool) & inside).sum() > 0.95 * inside.sum()
