"""A scan is continued beyond its upper and lower end with copies of its last planes, where the processor says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from stand_in_models import Contrast

from mome.errors import InputError
from mome.inference import Segmenter
from mome.inference.scan_grid import scan_grid
from mome.processing import MoMEProcessor
from mome.volumes import Grid, Volume, resample

WINDOW = {"spacing": [4, 5, 6], "hu_window": [-100, 100]}


class NeedsAPlaneAbove(Contrast):
    """A voxel belongs to a prompt where it and the voxel above it are dense; above the tile there is nothing."""

    def decode(self, features: torch.Tensor, text_PT: torch.Tensor) -> torch.Tensor:
        above = torch.nn.functional.pad(features[..., 1:], (0, 1))
        return super().decode(torch.minimum(features, above), text_PT)


def noise(shape: tuple[int, int, int] = (30, 28, 21), spacing: tuple[float, float, float] = (4, 5, 6)) -> Volume:
    hu = np.random.default_rng(0).normal(0, 60, shape).astype(np.float32)
    return Volume(hu, np.diag([*spacing, 1.0]))


def test_the_border_is_repeated_along_one_axis_only() -> None:
    source, scan = Grid((3, 4, 5), np.eye(4)), torch.arange(60.0).reshape(3, 4, 5)
    target = source.crop(2, -3, 7).crop(0, -1, 4)
    out = resample(scan, source, target, fill=-9.0, repeat=2)
    assert torch.equal(out[1:4, :, 3:8], scan)
    assert torch.equal(out[1:4, :, :3], scan[:, :, :1].expand(3, 4, 3))
    assert torch.equal(out[1:4, :, 8:], scan[:, :, -1:].expand(3, 4, 2))
    assert (out[[0, 4]] == -9).all()


@pytest.mark.parametrize("repeat", [0, 1, 2])
def test_the_border_is_repeated_beyond_an_oblique_grid(repeat: int) -> None:
    """A ramp along each axis shows where a value was read; the target has blocks that lie beyond the scan."""
    size = np.array([30, 31, 32])
    scan = torch.from_numpy(np.stack(np.meshgrid(*map(np.arange, size), indexing="ij")).astype(np.float32))
    source = Grid(tuple(size.tolist()), np.eye(4))
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [20, 15, 10], degrees=True).as_matrix()
    affine[:3, 3] = -70
    target = Grid((170, 170, 170), affine)
    out = resample(scan, source, target, fill=-9.0, repeat=repeat).numpy()
    places = np.stack(np.meshgrid(*map(np.arange, target.shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    beyond = (places < -0.5) | (places > size - 0.5)
    beyond[..., repeat] = False
    at_edge = ((np.abs(places + 0.5) < 1e-3) | (np.abs(places - size + 0.5) < 1e-3)).any(-1)
    inside = ~beyond.any(-1) & ~at_edge
    assert inside.sum() > 30 * 31 * 150 and (out[:, beyond.any(-1) & ~at_edge] == -9).all()
    np.testing.assert_allclose(out[:, inside].T, np.clip(places, 0, size - 1)[inside], atol=2e-3)


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SAR", "AIL"])
def test_the_inside_stays_and_the_ends_are_copies(orientation: str) -> None:
    """Voxels of the scan and of the network do not end at the same height."""
    scan = noise(spacing=(4, 5, 5.9))
    plain = MoMEProcessor(**WINDOW, orientation=orientation)
    longer = MoMEProcessor(**WINDOW, orientation=orientation, extend_mm=20)
    axis = next(axis for axis, letter in enumerate(orientation) if letter in "SI")
    inside, network = plain.to_network(scan)
    whole, grid = longer.to_network(scan, scan_grid(scan, longer))
    planes = round(20 / WINDOW["spacing"][axis])
    assert grid.shape[axis] == network.shape[axis] + 2 * planes
    assert grid.crop(axis, planes, planes + network.shape[axis]).same_as(network)
    array, before = whole[0, 0].movedim(axis, 0), inside[0, 0].movedim(axis, 0)
    assert torch.equal(array[planes:-planes], before)
    for ends, last in ((array[:planes], before[0]), (array[-planes:], before[-1])):
        assert (ends == ends[0]).all()
        assert (ends[0] - last).abs().max() < 0.05  # the network's last plane lies up to half a plane further inside


@pytest.mark.parametrize("exact", [False, True])
def test_a_network_sees_what_goes_on_beyond_the_last_plane(exact: bool) -> None:
    hu = np.full((30, 30, 20), -1000, np.float32)
    hu[8:22, 8:22] = 90
    scan = Volume(hu, np.diag([4.0, 4, 4, 1]))
    tops = []
    for extend_mm in (0, 8):
        processor = MoMEProcessor(spacing=[4, 4, 4], hu_window=[-100, 100], extend_mm=extend_mm)
        result = Segmenter(NeedsAPlaneAbove(), processor, exact=exact).segment(scan, "liver")
        assert result.masks["liver"].shape == hu.shape
        assert result.masks["liver"][8:22, 8:22, :-1].all() and not result.masks["liver"][:7].any()
        tops.append(bool(result.masks["liver"][8:22, 8:22, -1].all()))
    assert tops == [False, True]


def test_masks_that_do_not_depend_on_the_ends_stay() -> None:
    """Also of a scan that lies on its side in the file, and of one that is turned."""
    turned = np.eye(4)
    turned[:3, :3] = Rotation.from_euler("x", 25, degrees=True).as_matrix()
    sagittal = Volume(np.ascontiguousarray(noise().array.transpose(2, 0, 1)), np.diag([6.0, 4, 5, 1])[[1, 2, 0, 3]])
    # The ends of the turned scan lie between planes of the upright grid, of which one is beyond the scan.
    inner = (..., slice(1, -1))
    for scan, part in ((noise(), ...), (sagittal, ...), (Volume(noise().array, turned @ noise().affine), inner)):
        masks = [
            Segmenter(Contrast(), MoMEProcessor(**WINDOW, extend_mm=extend_mm), exact=True)
            .segment(scan, ["liver", "spleen"])
            .masks
            for extend_mm in (0, 30)
        ]
        for name in ("liver", "spleen"):
            assert masks[0][name].any()
            assert np.array_equal(masks[0][name][part], masks[1][name][part])


def test_a_run_with_other_ends_is_another_run(tmp_path: Path) -> None:
    assert "extend_mm" not in MoMEProcessor().to_dict()
    MoMEProcessor(extend_mm=15).save_pretrained(tmp_path)
    processor = MoMEProcessor.from_pretrained(tmp_path)
    assert processor.extend_mm == 15 and "extend_mm" not in processor.settings()  # which decide the cache of a training
    assert Segmenter(Contrast(), processor).mask_settings()["extend_mm"] == 15
    assert "extend_mm" not in Segmenter(Contrast(), MoMEProcessor()).mask_settings()


def test_a_grid_that_becomes_too_large_is_refused() -> None:
    processor = MoMEProcessor(spacing=[1, 1, 0.01], extend_mm=200)
    grid = Grid((1000, 1000, 1), np.diag([1.0, 1, 0.01, 1]))
    with pytest.raises(InputError, match="smaller extend_mm"):
        processor.extended(processor.network_grid(grid))
