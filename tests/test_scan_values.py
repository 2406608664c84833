"""Scans whose values cannot be HU are recognised, said to be so, and refused where no structure can be found."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from small_scans import patient_affine, patient_hu, save_mha, save_patient

from mome.errors import InputError
from mome.volumes import Volume, checked_volume, read_volume
from mome.volumes.hounsfield import doubt_about


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


@pytest.mark.parametrize("scan", ["patient", "soft tissue", "padded"])
@pytest.mark.parametrize("factor", [1e3, -1e3, 1e6, 1e30, -1e30])
def test_values_far_beyond_hu_are_refused(factor: float, scan: str, tmp_path: Path) -> None:
    array = {"patient": hu(), "soft tissue": PLAUSIBLE["inside an organ"], "padded": PLAUSIBLE["padding of -3024"]}
    volume = Volume(array[scan] * factor, patient_affine())
    with pytest.raises(InputError, match="not the values of a CT: .* beyond ±32,767, where no HU lie") as caught:
        checked_volume(volume, "ct.nii.gz")
    assert len(str(caught.value).splitlines()) == 3
    path = save_patient(tmp_path / "a.nii", scl_slope=factor, scl_inter=0)
    with pytest.raises(InputError, match="is the factor in the header right"):
        read_volume(path)
    assert any("beyond" in note for note in checked_volume(volume, any_values=True).notes)


def test_an_offset_far_beyond_hu_is_refused() -> None:
    for offset in (-1e6, 1e5, 1e9):
        with pytest.raises(InputError, match="where no HU lie"):
            checked_volume(Volume(hu() + offset, patient_affine()))
    with pytest.raises(InputError, match="where no HU lie"):
        checked_volume(Volume(np.where(hu() > -300, 1e30, -1e30), patient_affine()))


@pytest.mark.parametrize("padding", [-1e5, -(2.0**31), 1e30])
def test_one_value_of_padding_far_beyond_hu_is_none_of_the_scan(padding: float) -> None:
    array = np.where(np.arange(24)[:, None, None] < 6, padding, hu())
    volume = checked_volume(Volume(array, patient_affine()))
    assert not any("where no HU lie" in note for note in volume.notes)
    array[:, 0] = -array[:, 0]  # at the other end, too
    checked_volume(Volume(array, patient_affine()))


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


# The same cases at scans of another histogram: noisy air, and air of one value.
CAUSES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "wrong sign": (lambda a: -a, "wrong sign"),
    "unsigned 16 bits": (lambda a: np.where(a < 0, a + 65_536, a), "unsigned 16-bit"),
    "unsigned 12 bits": (lambda a: np.where(a < 0, a + 4_096, a), "unsigned 12-bit"),
    "plus 1024": (lambda a: a + 1024, "1024"),
    "plus 8192": (lambda a: a + 8192, "HU + 8192"),
    "minus 1024": (lambda a: a - 1024, "HU − 1024"),
    "ten times": (lambda a: a * 10, "HU × 10"),
    "twice": (lambda a: a * 2, "HU × 2"),
    "half": (lambda a: a / 2, "HU × 0.5"),
    "tenth": (lambda a: a / 10, "HU × 0.1"),
    "plus 300": (lambda a: a + 300, "offset"),
    "16-bit picture": (lambda a: (a + 1100) / 4500 * 65_535, "16-bit picture"),
    "bone window": (lambda a: np.clip(a, -450, 1050), "cut off"),
    "soft window": (lambda a: np.clip(a, -160, 240), "cut off"),
    "lung window": (lambda a: np.clip(a, -1350, 150), "exactly 150"),
    "padded with 0": (lambda a: np.pad(a, 6), "exactly the value 0"),
    "voxels in another order": (lambda a: np.random.default_rng(0).permutation(a.ravel()).reshape(a.shape), "noise"),
    "bytes in another order": (lambda a: a.astype("<i2").view(">i2").astype(float), "another offset or unit"),
    "all air": (lambda a: a * 0 + np.random.default_rng(0).normal(-1000, 20, a.shape), "as dark as air"),
    "quiet air": (lambda a: a * 0 + np.random.default_rng(0).normal(-1000, 2, a.shape), "no patient"),
    "uniform noise": (lambda a: np.random.default_rng(0).uniform(-1024, 3071, a.shape), "this is noise"),
    "wide noise": (lambda a: np.random.default_rng(0).normal(0, 300, a.shape), "this is noise"),
    "one value of air": (lambda a: np.full(a.shape, -1000.0), "no patient"),
    "one value of tissue": (lambda a: np.full(a.shape, 40.0), "no patient"),
    "thresholded": (lambda a: np.where(a > -300, 1000.0, -1000.0), "only 0.0%"),
}
SCANS = {"noisy air": hu(), "air of one value": np.where(hu() < -950, -1000, hu()).astype(np.float32)}


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("name", CAUSES)
def test_the_likely_cause_is_named(name: str, scan: str) -> None:
    change, words = CAUSES[name]
    volume = Volume(change(SCANS[scan]), patient_affine())
    said = checked_volume(volume, any_values=True).notes
    assert len(said) == 1 and words in said[0], said
    if name in ("wrong sign", "unsigned 16 bits", "unsigned 12 bits"):
        with pytest.raises(InputError, match="not the values of a CT"):
            checked_volume(volume)
    else:
        assert checked_volume(volume).notes == said


def real_scans() -> list[Path]:
    root = os.environ.get("MOME_TEST_DATA")
    folders = ("torso", "torso/msd_spleen/images", "openkbp/val/images")
    found = [sorted((Path(root) / folder).glob("*.nii.gz")) for folder in folders] if root else []
    names = ("ts_aorta_ct", "ts_pulmonary_ct", "ts_example_ct_sm", "spleen_8", "openkbp_207")
    return [path for paths in found for path in paths if path.name.removesuffix(".nii.gz") in names]


@pytest.mark.parametrize("path", real_scans() or [None], ids=lambda path: path.name if path else "none")
def test_real_scans_and_crops_of_the_body_are_not_doubted(path: Path | None) -> None:
    if path is None:
        pytest.skip("needs MOME_TEST_DATA")
    array = nib.load(path).get_fdata(dtype=np.float32)
    assert doubt_about(array) is None
    assert doubt_about(np.pad(array, 5, constant_values=-2000)) is None
    assert doubt_about(np.pad(array, 5, constant_values=-3024)) is None
    metal = array.copy()
    metal[::40, ::40, ::10] = 20_000
    assert doubt_about(metal) is None
    soft = np.argwhere(array[::3, ::3, ::3] > -50) * 3
    for at in soft[:: max(1, len(soft) // 12)]:
        crop = array[tuple(slice(max(0, x - 12), x + 12) for x in at)]
        doubt = doubt_about(crop)
        mostly_air = (crop < -200).mean() > 0.9
        assert doubt is None or mostly_air, (at, doubt)


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


def test_a_second_check_of_unchanged_voxels_is_left_out(monkeypatch) -> None:
    from mome.volumes import check

    array = np.random.default_rng(0).normal(0, 300, (40, 40, 40)).astype(np.float32)
    made = checked_volume(Volume(array, np.diag([2.0, 2, 2, 1])))
    seen: list[int] = []
    monkeypatch.setattr(check, "doubt_about", lambda *given: seen.append(1))
    assert checked_volume(made) is made and not seen
    for changed in (
        Volume(made.array, made.affine),
        replace(made, affine=made.affine * 1.0 + np.diag([1e-6, 0, 0, 0])),
        replace(made, array=made.array[::-1]),
        replace(made, array=np.ascontiguousarray(made.array.T)),
        replace(made, array=made.array.astype(np.float64)),
    ):
        seen.clear()
        checked_volume(changed)
        assert seen
    with pytest.raises(InputError, match="three dimensions"):
        checked_volume(replace(made, array=np.zeros((0, 4, 4), np.float32)))
    made.array[3, 4, 5] = np.nan
    assert np.isfinite(checked_volume(made).array).all() and seen


def test_values_that_are_let_pass_with_a_note_are_refused_later() -> None:
    array = np.random.default_rng(0).random((20, 20, 20)).astype(np.float32)
    noted = checked_volume(Volume(array, np.diag([2.0, 2, 2, 1])), any_values=True)
    assert any("normalised" in note for note in noted.notes)
    with pytest.raises(InputError, match="normalised"):
        checked_volume(noted)
