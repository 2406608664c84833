"""Masks of solid structures that lie in air."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from training_runs import write_cases

from mome.data.check import check_cases
from mome.data.layouts import open_cases
from mome.data.masks_in_air import masks_in_air


def box(start: int, stop: int) -> np.ndarray:
    mask = np.zeros((20, 20, 20), bool)
    mask[start:stop, 4:16, 4:16] = True
    return mask


def test_a_tenth_in_air_is_said_of_solid_structures_only() -> None:
    hu = np.where(box(5, 15), 40.0, -1000.0)
    inside, beside, barely = box(6, 14), box(12, 18), box(5, 16)
    said = masks_in_air(hu, {"liver": beside, "spleen": inside, "kidney_left": barely, "lung_left": beside})
    assert said == ["50% of the mask of liver lies in air: are these the labels of this scan?"]
    assert not masks_in_air(hu, {"my own structure": beside, "colon": beside, "pancreas": np.zeros_like(beside)})


@pytest.mark.parametrize("moved", [False, True])
def test_the_check_of_a_folder_says_so(tmp_path: Path, moved: bool) -> None:
    folder = write_cases(tmp_path / "d", 1)
    path = folder / "images" / "c0.nii.gz"
    image = nib.load(path)
    hu = np.asarray(image.dataobj).copy()
    if moved:
        hu[16:19] = -1000
    nib.save(nib.Nifti1Image(hu, image.affine), path)
    found = [finding for finding in check_cases(open_cases(folder, "cases", "openkbp")) if "in air" in finding.what]
    assert [finding.what for finding in found] == (
        ["75% of the mask of parotid_gland_left lies in air: are these the labels of this scan?"] if moved else []
    )
    assert not any(finding.is_error for finding in found)
