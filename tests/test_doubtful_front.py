"""A scan whose front is its back is noted, as an array of LPS under an affine without signs; right scans are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_doubtful_axes import AFFINE, BODY, notes, real_scans

from mome.volumes import Volume, checked_volume, read_volume
from mome.volumes.doubtful_front import doubtful_front

FRONT = "are the signs of the affine missing"


def is_noted(array: np.ndarray, affine: np.ndarray = AFFINE) -> bool:
    return any(FRONT in note for note in notes(np.ascontiguousarray(array), affine))


def test_a_body_whose_spine_is_in_front_is_noted() -> None:
    assert is_noted(BODY[:, ::-1]) and is_noted(BODY[::-1, ::-1])
    assert not is_noted(BODY) and not is_noted(BODY[::-1]) and not is_noted(BODY[:, :, ::-1])


def test_an_affine_that_says_so_is_right() -> None:
    """Arrays of LPS, of prone patients and of other orders of the axes are right where their affine is."""
    left_posterior = np.diag([-4.0, -4.0, 2.5, 1.0])
    assert not is_noted(BODY[::-1, ::-1], left_posterior) and is_noted(BODY, left_posterior)
    stored = BODY.transpose(1, 2, 0)
    affine = AFFINE[:, [1, 2, 0, 3]]
    assert not is_noted(stored, affine) and is_noted(stored[::-1], affine)


def test_what_has_no_air_or_no_bone_is_not_judged() -> None:
    turned = BODY[:, ::-1]
    assert doubtful_front(turned.clip(-1024, 200), AFFINE) == [] != doubtful_front(turned, AFFINE)
    assert doubtful_front(np.where(turned < -400, -300, turned), AFFINE) == []
    assert doubtful_front(turned[:, :, :15], AFFINE) == []
    assert doubtful_front(np.full_like(BODY, -1000), AFFINE) == []


@pytest.mark.parametrize("name", ["torso/ts_example_ct.nii.gz", "openkbp/val/images/openkbp_202.nii.gz"])
def test_a_real_scan_under_the_voxel_sizes_alone(ct_data: Path, name: str) -> None:
    volume = read_volume(ct_data / name)
    assert not any(FRONT in note for note in volume.notes)
    if volume.grid.orientation == "RAS":
        array = volume.array[::-1, ::-1]
    else:
        assert volume.grid.orientation == "PLI"
        array = volume.array.transpose(1, 0, 2)[:, :, ::-1]
    spacing = np.abs(volume.affine[:3, :3]).sum(axis=1)
    sizes_alone = Volume(np.ascontiguousarray(array), np.diag([*spacing, 1.0]))  # the array runs to LPS
    assert any(FRONT in note for note in checked_volume(sizes_alone).notes)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_real_scans_have_no_note_and_turned_ones_have_one(ct_data: Path) -> None:
    found, wrong = [], []
    for name, volume in real_scans(ct_data):
        wrong += [name] * bool(doubtful_front(volume.array, volume.affine))
        axis = next(axis for axis in range(3) if abs(volume.affine[1, axis]) == np.abs(volume.affine[1, :3]).max())
        found.append(bool(doubtful_front(np.flip(volume.array, axis), volume.affine)))
    print(f"false notes: {len(wrong)} of {len(found)} scans; turned scans with a note: {sum(found)}")
    assert not wrong
    assert np.mean(found) >= 0.8
