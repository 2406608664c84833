"""Masks of which one lies above another in a way that no patient has."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mome import Segmenter
from mome.inference.doubtful_anatomy import upside_down
from mome.inference.packed import PackedMasks
from mome.volumes import Grid, Volume, read_volume

UPSIDE_DOWN = np.diag([1.0, 1, -1, 1])


def packed(boxes: dict[str, tuple[int, int]], shape: tuple[int, int, int] = (40, 40, 60)) -> PackedMasks:
    """Masks of boxes from one plane to another."""
    masks = PackedMasks(list(boxes), shape, 2)
    for name, (first, last) in boxes.items():
        masks.write_box(name, (5, 5, first), np.ones((30, 30, last - first), bool))
    return masks


@pytest.mark.parametrize("side", [5.0, 1.0])  # of a voxel; at 1 mm the masks are too small to be looked at
@pytest.mark.parametrize("up", [1, -1])
def test_the_liver_above_the_lungs_is_said(side: float, up: int) -> None:
    grid = Grid((40, 40, 60), np.diag([side, side, side * up, 1.0]))
    lungs = {"lung_left": (2, 20), "lung_right": (4, 20)}
    notes = upside_down(packed({**lungs, "liver": (25, 40)}), grid)
    assert len(notes) == (up == 1 and side == 5), notes
    assert not notes or notes[0].startswith("the mask of the liver lies 105 mm above those of the lungs: a mask is wro")
    assert len(upside_down(packed({"liver": (2, 20), "lung_upper_lobe_left": (25, 40)}), grid)) == (
        up == -1 and side == 5
    )


def test_what_is_not_asked_or_empty_is_not_looked_at() -> None:
    grid = Grid((40, 40, 60), np.diag([5.0, 5, 5, 1]))
    for boxes in ({"liver": (25, 40)}, {"lung_left": (2, 20)}, {"liver": (25, 40), "lung_left": (0, 0)}):
        assert upside_down(packed(boxes), grid) == []
    assert upside_down(packed({"liver": (2, 40), "lung_left": (2, 38)}), grid) == []  # hardly higher


def test_many_voxels_are_sampled() -> None:
    shape = (200, 200, 260)
    masks, grid = PackedMasks(["liver", "lung_left"], shape, 2), Grid(shape, np.diag([1.0, 1, 1, 1]))
    for name, first in (("liver", 150), ("lung_left", 20)):
        masks.write_box(name, (21, 21, first), np.ones((150, 150, 61), bool))
    assert "lies 130 mm above" in upside_down(masks, grid)[0]
    # A mask of one plane, which no sample meets.
    shape = (200, 200, 400)
    masks = PackedMasks(["liver", "lung_left"], shape, 2)
    masks.write_box("liver", (0, 0, 201), np.ones((200, 200, 1), bool))
    masks.write_box("lung_left", (21, 21, 20), np.ones((150, 150, 61), bool))
    assert upside_down(masks, Grid(shape, np.diag([2.5, 2.5, 2.5, 1]))) == []


def test_the_height_is_that_of_the_scan_in_any_order_of_its_axes() -> None:
    shape = (60, 50, 40)
    masks = PackedMasks(["liver", "lung_left"], shape, 2)
    masks.write_box("liver", (40, 5, 12), np.ones((10, 30, 20), bool))
    masks.write_box("lung_left", (10, 15, 2), np.ones((20, 20, 10), bool))
    for axis, said in enumerate((["125 mm"], [], ["75 mm"])):
        affine = np.eye(4)
        affine[:3, :3] = 5 * np.roll(np.eye(3), axis - 2, axis=1)  # this axis runs upwards
        notes = upside_down(masks, Grid(shape, affine))
        assert [" ".join(note.split()[6:8]) for note in notes] == said


def test_the_height_takes_no_list_of_voxels() -> None:
    """Lists of indices took 24 bytes for each of millions of voxels, 0.7 GB where liver and lungs are large."""
    shape = (120, 120, 120)
    masks, grid = PackedMasks(["liver", "lung_left"], shape, 2), Grid(shape, np.diag([2.0, 2, 2, 1]))
    masks.write_box("liver", (0, 0, 60), np.ones((120, 120, 60), bool))
    masks.write_box("lung_left", (0, 0, 0), np.ones((120, 120, 60), bool))
    tracemalloc.start()
    try:
        assert "lies 120 mm above" in upside_down(masks, grid)[0]
        assert tracemalloc.get_traced_memory()[1] < 4 * masks["liver"].nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.wide
@pytest.mark.parametrize(
    ("scan", "is_noticed"),
    [
        ("formats/cip_ct-64.nrrd", True),  # chest
        ("unlabelled/crlm-1006_1p6x5mm_ct_unlabelled.nii.gz", True),  # abdomen and the lower halves of the lungs
        ("torso/ts_example_ct_sm.nii.gz", False),  # hardly any lung
    ],
)
def test_real_scans_upside_down(ct_data: Path, scan: str, is_noticed: bool) -> None:
    volume = read_volume(ct_data / scan)
    segmenter = Segmenter("mome-ct-torso-tiny")
    prompts = segmenter.prepare(["liver", "lungs"])
    for affine, expected in ((volume.affine, False), (UPSIDE_DOWN @ volume.affine, is_noticed)):
        result = segmenter.segment(Volume(volume.array, affine), prompts)
        said = [note for note in result.notes if "above those of the lungs" in note]
        assert len(said) == expected and set(said) <= set(result.doubts), result.notes
