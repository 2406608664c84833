"""Scans whose values cannot be HU are recognised, said to be so, and refused where no structure can be found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_scans import patient_affine, patient_hu, save_mha, save_patient

from mome.errors import InputError
from mome.volumes import Volume, checked_volume, read_volume


def hu() -> np.ndarray:
    return patient_hu().astype(np.float32)


def windowed(low: float, high: float, top: float) -> np.ndarray:
    return np.clip((hu() - low) / (high - low), 0, 1) * top


HOPELESS = {
    "z-scored": (hu() - hu().mean()) / hu().std(),
    "z-scored over the body": (hu() - 40) / 100,
    "0 to 1": windowed(-175, 250, 1),
    "0 to 1 of all HU": windowed(-1024, 3071, 1),
    "-1 to 1": windowed(-1000, 1000, 2) - 1,
    "0 to 100 per mille": hu() / 1000,
    "attenuation per mm": 0.0195 * (1 + hu() / 1000),
    "8 bit, soft window": windowed(-160, 240, 255).round(),
    "8 bit, wide window": windowed(-1024, 3071, 255).round(),
    "8 bit, not rounded": windowed(-1000, 1000, 255),
    "z-scored with NaN around": np.where(np.arange(24)[:, None, None] < 2, np.nan, (hu() - 40) / 100),
    "label map": np.where(hu() > 300, 5.0, 0.0),
    "8 bit, interpolated": windowed(-1000, 1000, 255) - 3,
    "percent": windowed(-1000, 1000, 100),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_normalised_values_and_pictures_are_refused(name: str) -> None:
    values = Volume(HOPELESS[name], patient_affine())
    with pytest.raises(InputError, match="not the values of a CT: values lie in") as caught:
        checked_volume(values, "ct.nii.gz")
    assert "ct.nii.gz" in str(caught.value) and len(str(caught.value).splitlines()) == 3
    assert "not HU" in checked_volume(values, any_values=True).notes[-1]  # `mome info` shows such files


DOUBTFUL = {
    "offset 1024": (hu() + 1024, "offset of 1024"),
    "offset 1000": (hu() + 1100, "offset of 1024"),
    "offset 1024, padded": (np.where(np.arange(24)[:, None, None] < 2, -2000, hu()) + 1024, "offset of 1024"),
    "z-scored, padded": (np.where(hu() < -500, -1024, (hu() - 40) / 100), "looks normalised"),
    "offset twice": (hu() - 1024, "another offset or unit"),
    "half the slope": (hu() * 0.4, "air is −1000 HU"),
    "tenth": (hu() / 10, "air is −1000 HU"),
    "ten times": (hu() * 10 + 5000, "another offset or unit"),
    "16 bit": (windowed(-1024, 3071, 65535), "no value is below 0"),
    "10 bit": (windowed(-1024, 1000, 800), "no voxel is air or fat"),
    "metal of 100,000": (np.where(hu() > 450, 100_000, hu()), "more than any metal"),
    "cut off at the window": (np.clip(hu(), -175, 250), "cut off there"),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_offsets_units_and_cuts_are_noted(name: str) -> None:
    array, words = DOUBTFUL[name]
    volume = checked_volume(Volume(array, patient_affine()))
    assert len(volume.notes) == 1 and words in volume.notes[0]
    assert checked_volume(volume).notes == volume.notes


PLAUSIBLE = {
    "plain": hu(),
    "padding of -2000": np.where(np.arange(24)[:, None, None] < 2, -2000, hu()),
    "padding of -3024": np.where(np.arange(24)[:, None, None] < 2, -3024, hu()),
    "inside an organ": np.random.default_rng(0).normal(40, 12, (20, 20, 20)),
    "spine without air": hu().clip(-150, 150)[9:15, 9:13, :] + np.random.default_rng(0).gamma(1, 180, (6, 4, 20)),
    "fat and muscle": np.where(np.arange(24)[:, None, None] < 10, hu() * 0 - 100, 50)
    + np.random.default_rng(0).normal(0, 12, (24, 22, 20)),
    "body only": hu()[9:15, 9:13, :],
    "metal": np.where(hu() > 450, 20_000, hu()),
    "from -1024": np.clip(hu(), -1024, 3071),
}


@pytest.mark.parametrize("name", PLAUSIBLE)
def test_scans_in_hu_get_no_note(name: str) -> None:
    assert checked_volume(Volume(PLAUSIBLE[name], patient_affine())).notes == ()


def test_nothing_finite_is_refused() -> None:
    with pytest.raises(InputError, match="no voxel has a finite value"):
        checked_volume(Volume(np.full((4, 4, 4), np.nan), np.eye(4)))


def test_files_and_scalings_are_judged_after_their_scaling(tmp_path: Path) -> None:
    stored = (patient_hu() + 1024).astype(np.int16)
    assert read_volume(save_patient(tmp_path / "a.nii", stored, scl_slope=1, scl_inter=-1024)).notes == ()
    assert "offset of 1024" in read_volume(save_patient(tmp_path / "b.nii", stored)).notes[0]
    path = save_mha(tmp_path / "c.mha", stored, ElementToIntensityFunctionOffset="-1024")
    np.testing.assert_array_equal(read_volume(path).array, patient_hu())
    with pytest.raises(InputError, match="in: .*d.nii.gz"):
        read_volume(save_patient(tmp_path / "d.nii.gz", HOPELESS["z-scored"].astype(np.float32)))
