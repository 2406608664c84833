"""Volumes and evaluations that a converter or a script made wrong, and that say so."""

from __future__ import annotations

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from small_scans import SHAPE, patient_affine, patient_hu

from mome.errors import InputError
from mome.metrics.evaluate import evaluate_folder
from mome.volumes import Volume, checked_volume, read_volume


def notes_of(array: np.ndarray) -> str:
    return " ".join(checked_volume(Volume(array, patient_affine())).notes)


def test_label_maps_of_large_numbers_are_refused(ct_data: Path) -> None:
    """Numbers above 255, as of FreeSurfer or the Chest Imaging Platform, were segmented with a note on missing fat."""
    array = np.zeros(SHAPE, np.float32)
    for number, label in enumerate((2, 41, 512, 1002, 2035)):
        array[number : number + 6, 2:8, 2:8] = label
    for high in (2035, 512):
        with pytest.raises(InputError, match=f"{high:,}.* looks like a label map"):
            checked_volume(Volume(np.where(array > high, 0, array), np.diag([4.0, 4.0, 4.0, 1.0])))
    with pytest.raises(InputError, match="782.* looks like a label map"):
        read_volume(ct_data / "formats" / "cip_lm-64.nrrd")
    assert read_volume(ct_data / "formats" / "cip_lm-64.nrrd", any_values=True).array.max() == 782


def test_planes_without_their_intercept_are_noted() -> None:
    for planes in (slice(10, None), slice(1, None, 2)):
        hu = patient_hu().astype(np.float32)
        hu[:, :, planes] += 1024
        assert "do some planes lack their intercept" in notes_of(hu)


def test_copied_planes_are_noted() -> None:
    hu = patient_hu()
    hu[:, :, 7] = hu[:, :, 6]
    assert "1 planes have the same pixels as the slice before, at another place, as plane 8" in notes_of(hu)


def test_padding_and_whole_scans_are_not_doubted() -> None:
    hu = np.pad(patient_hu(), ((0, 0), (0, 0), (0, 9)), constant_values=-1024)
    for array in (hu, patient_hu()):
        assert "plane" not in notes_of(array)


def test_an_affine_with_another_last_row_is_refused() -> None:
    affine = patient_affine()
    affine[3] = (0, 0, 1, 1)
    with pytest.raises(InputError, match="the last row of the affine"):
        checked_volume(Volume(patient_hu(), affine))


@pytest.mark.parametrize("kind", [object, np.complex64, "U8"])
def test_voxels_that_are_no_real_numbers_are_refused(kind: object) -> None:
    with pytest.raises(InputError, match="the voxels of a CT are real numbers"):
        checked_volume(Volume(patient_hu().astype(kind), patient_affine()))


def test_masked_voxels_are_air_and_noted() -> None:
    hu = patient_hu()
    volume = checked_volume(Volume(np.ma.array(hu, mask=hu > 300), patient_affine()))
    assert (volume.array[hu > 300] == -1024).all() and "voxels are masked" in " ".join(volume.notes)


def save_mask(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(array.astype(np.uint8), patient_affine()), path)


def test_what_an_evaluation_leaves_out_or_doubts_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mask = np.zeros(SHAPE)
    mask[5:10, 5:10, 5:10] = 1
    for name in ("a", "b"):
        save_mask(tmp_path / "p" / f"{name}_mandible.nii.gz", mask)
    save_mask(tmp_path / "r" / "a_mandible.nii.gz", 1 - mask)
    with caplog.at_level(logging.WARNING):
        evaluate_folder(tmp_path / "p", tmp_path / "r")
        evaluate_folder(tmp_path / "p", tmp_path / "p")
    assert "1 predicted cases have no reference and are not scored: b" in caplog.text
    assert "the reference of 'mandible' fills" in caplog.text and "is it inverted?" in caplog.text
    assert "prediction and reference are the same files" in caplog.text
