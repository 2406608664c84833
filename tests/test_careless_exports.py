"""What careless exports and conversions leave in a scan is said: lost voxel sizes, merged pixels, maps, two dates."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_series import along_z, series, write
from small_scans import patient_affine, patient_hu

from mome.errors import InputError
from mome.metrics import evaluate_folder
from mome.volumes import Grid, Volume, checked_volume, read_volume
from mome.volumes.mask_file import write_mask

POSITIONS = along_z(np.arange(6) * 3.0)
WIDTH = 24.0  # mm, of the slices of `dicom_series`
NOTES: dict[str, tuple[dict[str, Any], str]] = {
    "merged pixels": ({"ReconstructionDiameter": 2 * WIDTH}, "was it resized without a new PixelSpacing"),
    "padded": ({"ReconstructionDiameter": 0.8 * WIDTH}, "was it resized without a new PixelSpacing"),
    "projection": ({"SeriesDescription": "Thorax MIP 10mm"}, "SeriesDescription speaks of MIP"),
    "map": ({"SeriesDescription": "Iodine map"}, "SeriesDescription speaks of IODINE"),
    "calcium": ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "VNCA"]}, "the images were processed"),
    "unit": ({"RescaleType": "US"}, "RescaleType is US"),
}


def dicom_notes(folder: Path, **changes: Any) -> tuple[str, ...]:
    return read_volume(write(folder, series(POSITIONS, **changes))).notes


@pytest.mark.parametrize("name", NOTES)
def test_headers_of_doubtful_exports_are_noted(tmp_path: Path, name: str) -> None:
    changes, words = NOTES[name]
    notes = dicom_notes(tmp_path, **changes)
    assert sum(words in note for note in notes) == 1, notes


def test_usual_headers_are_not_noted(tmp_path: Path) -> None:
    plain = dicom_notes(tmp_path / "plain")
    usual = {"SeriesDescription": "Thorax 2.0 B30f", "StudyDate": "20240105", "RescaleType": "HU"}
    for ratio in (1.0, 1.5, 3.0):  # a crop is narrower than the field of view, by any ratio
        assert dicom_notes(tmp_path / f"{ratio}", ReconstructionDiameter=ratio * WIDTH, **usual) == plain


def test_two_dates_of_one_series_are_noted(tmp_path: Path) -> None:
    made = series(POSITIONS)
    for number, image in enumerate(made):
        image.StudyDate = "20240105" if number < 3 else "20240106"
    notes = read_volume(write(tmp_path, made)).notes
    assert "StudyDate differs between slices: do they come from one scan?" in notes
    assert not any("2024" in note for note in notes)  # dates identify patients


@pytest.mark.parametrize("word", ["CBF", "CBV", "MTT", "TMAX"])
def test_maps_of_perfusion_are_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises(InputError, match=f"ImageType says .*{word}"):
        dicom_notes(tmp_path, ImageType=["DERIVED", "SECONDARY", "AXIAL", word])


@pytest.mark.parametrize("steps", [(1, 1, 1), (-1, -1, 1)])
def test_an_affine_that_nobody_gave_is_noted(steps: tuple[int, int, int]) -> None:
    words = "where nobody gave the voxel size"
    affine = np.diag([*map(float, steps), 1.0])
    notes = checked_volume(Volume(patient_hu(), affine)).notes
    assert sum(words in note for note in notes) == 1, notes
    placed = affine.copy()
    placed[:3, 3] = (-90, -95, -60)
    for other in (placed, np.diag([0.9, 1, 1, 1]), patient_affine()):
        assert not any(words in note for note in checked_volume(Volume(patient_hu(), other)).notes)


def test_an_equalised_histogram_is_noted() -> None:
    hu = patient_hu()
    ranks = np.argsort(np.argsort(hu.ravel(), kind="stable")).reshape(hu.shape)
    notes = checked_volume(Volume(ranks / hu.size * 2000 - 1000, patient_affine())).notes
    assert any("the histogram was equalised" in note for note in notes), notes


def test_a_reference_without_a_voxel_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid, mask = Grid((8, 8, 8), patient_affine()), np.zeros((8, 8, 8), np.uint8)
    mask[2:5, 2:5, 2:5] = 1
    for side, scale in (("p", 1), ("r", 0)):
        (tmp_path / side).mkdir()
        write_mask(tmp_path / side / "a_mandible.nii.gz", scale * mask, grid)
        write_mask(tmp_path / side / "b_mandible.nii.gz", mask, grid)
    with caplog.at_level(logging.WARNING):
        scores = evaluate_folder(tmp_path / "p", tmp_path / "r")
    assert [score.dice for score in scores] == [0, 1]
    assert caplog.text.count("has no voxel") == 1 and "case 'a': the reference of 'mandible'" in caplog.text
