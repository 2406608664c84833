"""DICOM series lie where their headers say: plain, tilted, irregular, reversed, sagittal, enhanced, and with gaps.

Each series is written here with pydicom. The check knows only the positions that were written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_series import (
    AXIAL,
    COLUMNS,
    ROWS,
    SAGITTAL,
    along_z,
    dataset,
    enhanced,
    largest_error,
    largest_hu_error,
    series,
    slice_hu,
    tilted,
    write,
)

from mome.errors import InputError
from mome.volumes import Volume, read_volume
from mome.volumes.dicom import DicomOptions

REGULAR = np.arange(9) * 3.0
ALONG_X = np.array([[20.0 + 3 * k, -11.5, 40] for k in range(9)])
OBLIQUE = (0.96, 0.28, 0.0, -0.224, 0.768, 0.6)  # its normal is (0.168, -0.576, 0.8)


def note(volume: Volume, words: str) -> bool:
    return any(words in text for text in volume.notes)


REGULAR_SERIES = {
    "plain": (AXIAL, along_z(REGULAR)),
    "reversed": (AXIAL, along_z(REGULAR[::-1])),
    "shuffled": (AXIAL, along_z(REGULAR)[[4, 0, 7, 2, 8, 1, 6, 3, 5]]),
    "tilted": (tilted(15), along_z(REGULAR)),
    "tilted back": (tilted(-22.5), along_z(REGULAR)),
    "turned and tilted": ((0.6, 0.8, 0, -0.8, 0.6, 0), along_z(REGULAR) + np.outer(REGULAR, [0.05, -0.1, 0])),
    "sagittal": (SAGITTAL, ALONG_X),
    "sagittal reversed": (SAGITTAL, ALONG_X[::-1]),
    "oblique": (OBLIQUE, np.outer(REGULAR, [0.168, -0.576, 0.8]) + (3, 4, 5)),
    "feet first": ((-1, 0, 0, 0, 1, 0), along_z(REGULAR)),
    "overlapping": (AXIAL, along_z(REGULAR / 6)),
    "rounded to 0.1 mm": (AXIAL, along_z(np.round(np.arange(12) * 0.625, 1))),
}


@pytest.mark.parametrize("name", REGULAR_SERIES)
def test_regular_series(tmp_path: Path, name: str) -> None:
    orientation, positions = REGULAR_SERIES[name]
    volume = read_volume(write(tmp_path, series(positions, orientation)))
    assert volume.shape == (COLUMNS, ROWS, len(positions))
    assert largest_error(volume.affine, positions, orientation) < 0.1
    assert largest_hu_error(volume.array, volume.affine) < 1.1
    assert note(volume, "tilted") == ("tilted" in name)


def test_the_shear_of_a_tilt_is_in_the_affine_alone(tmp_path: Path) -> None:
    volume = read_volume(write(tmp_path, series(along_z(REGULAR), tilted(15))))
    np.testing.assert_allclose(volume.affine[:3, 2], [0, 0, 3], atol=1e-9)
    assert note(volume, "the gantry is tilted by 15.0°") and volume.header["qform_code"] == 0
    assert read_volume(write(tmp_path / "plain", series(along_z(REGULAR)))).header["qform_code"] == 1


IRREGULAR = {
    "one slice missing": np.delete(REGULAR, 4),
    "two slices missing": np.delete(REGULAR, [2, 6]),
    "step doubles": np.array([0, 3, 6, 9, 12, 18, 24, 30, 36.0]),
    "step halves": np.array([0, 4, 8, 12, 14, 16, 18, 20.0]),
    "two steps": np.array([0, 5, 10, 15, 18, 21, 24, 27.0]),
    "odd steps": np.array([0, 2.5, 5.7, 7.9, 11.2, 13.4, 17, 19.1]),
}


@pytest.mark.parametrize("name", IRREGULAR)
@pytest.mark.parametrize("orientation", [AXIAL, tilted(12)], ids=["straight", "tilted"])
def test_irregular_series(tmp_path: Path, name: str, orientation: Any) -> None:
    positions = along_z(IRREGULAR[name])
    volume = read_volume(write(tmp_path, series(positions, orientation)))
    assert note(volume, "the distance between slices varies")
    assert note(volume, "seem to be missing") == ("missing" in name)
    # every slice is a plane of the volume, but for steps without a common divisor
    assert largest_error(volume.affine, positions, orientation, on_planes=name != "odd steps") < 0.1
    assert largest_hu_error(volume.array, volume.affine) < 1.1
    ends = np.linalg.inv(volume.affine) @ [*(positions[-1] * (-1, -1, 1)), 1]
    assert abs(ends[2] - (volume.shape[2] - 1)) < 0.05


def test_slices_at_planes_are_copied(tmp_path: Path) -> None:
    """The values of a slice that lies on a plane are not interpolated."""
    positions, noise = along_z(np.delete(REGULAR, 4)), np.random.default_rng(0)
    hu = noise.integers(-1000, 1000, (8, ROWS, COLUMNS)).astype(float)
    volume = read_volume(write(tmp_path, [dataset(p, hu=h) for p, h in zip(positions, hu, strict=True)]))
    np.testing.assert_array_equal(np.delete(volume.array, 4, axis=2), hu.transpose(2, 1, 0))
    np.testing.assert_allclose(volume.array[:, :, 4], (hu[3] + hu[4]).T / 2, atol=1e-3)


def test_ten_slices_missing_are_refused_unless_asked(tmp_path: Path) -> None:
    positions = along_z(np.delete(np.arange(30) * 3.0, range(8, 18)))
    folder = write(tmp_path, series(positions))
    with pytest.raises(InputError, match=r"a gap of 33 mm after slice 8 of 20.*\n.*\n.*--allow-gaps"):
        read_volume(folder)
    volume = read_volume(folder, dicom=DicomOptions(allow_gaps=True))
    assert volume.shape[2] == 30 and note(volume, "is air in gaps") and note(volume, "33 mm after slice 8")
    assert largest_error(volume.affine, positions) < 0.1
    assert np.array_equal(volume.array[:, :, 9:17], np.full((COLUMNS, ROWS, 8), -1024))
    scanned = np.delete(volume.array, range(8, 18), axis=2)
    np.testing.assert_allclose(scanned, np.stack([slice_hu(p, AXIAL).T for p in positions], axis=2), atol=0.51)


@pytest.mark.parametrize("start", [0.0, -20.8, 37.6])
def test_a_gap_of_exactly_the_limit_is_interpolated_wherever_the_series_begins(tmp_path: Path, start: float) -> None:
    """Sums of rounded numbers decided: "a gap of 10 mm … up to 10 mm are interpolated"."""
    heights = np.array([*range(0, 20, 2), *range(28, 48, 2)]) + start
    volume = read_volume(write(tmp_path / "ct", series(along_z(heights))))
    assert any("slices seem to be missing: about 4 after slice 10" in note for note in volume.notes)
    heights[10:] += 0.2
    with pytest.raises(InputError, match="a gap of 10.2 mm"):
        read_volume(write(tmp_path / "more", series(along_z(heights))))


@pytest.mark.parametrize("heights", [[0, 3, 36], [0, 33, 36], [0, 3, 6, 39, 42], [0, 30, 33, 63, 66, 69]])
def test_gaps_of_short_series_are_refused(tmp_path: Path, heights: list[float]) -> None:
    with pytest.raises(InputError, match="slices are missing: a gap of 3[03] mm"):
        read_volume(write(tmp_path, series(along_z(heights))))


@pytest.mark.parametrize("step", [5.0, 7.5, 10.0])
def test_thick_slices_have_no_gaps(tmp_path: Path, step: float) -> None:
    assert read_volume(write(tmp_path, series(along_z(np.arange(6) * step)))).spacing[2] == pytest.approx(step)


def test_sparse_slices_are_noted(tmp_path: Path) -> None:
    assert note(read_volume(write(tmp_path, series(along_z(np.arange(6) * 20)))), "slices are 20 mm apart")


def test_duplicates_are_dropped(tmp_path: Path) -> None:
    positions = along_z(REGULAR)
    write(tmp_path, series(positions)), write(tmp_path, series(positions))
    volume = read_volume(tmp_path)
    assert volume.shape[2] == 9 and note(volume, "9 duplicate slices")
    assert largest_error(volume.affine, positions) < 0.1 and largest_hu_error(volume.array, volume.affine) < 1.1


def test_different_images_at_one_place(tmp_path: Path) -> None:
    positions = along_z(REGULAR)
    for phase in range(3):
        made = [dataset(p, hu=np.full((ROWS, COLUMNS), 100.0 * phase), AcquisitionNumber=phase) for p in positions]
        write(tmp_path / "phases", made)
    with pytest.raises(
        InputError, match=r"9 of 9 places have several different images.*3 time points.*\n.*\n.*--frame"
    ):
        read_volume(tmp_path / "phases")
    volume = read_volume(tmp_path / "phases", frame=1)
    assert volume.shape[2] == 9 and set(np.unique(volume.array)) == {100.0} and note(volume, "time point 1")
    write(tmp_path / "overlap", series(positions))
    write(tmp_path / "overlap", [dataset(p, hu=np.full((ROWS, COLUMNS), 7.0)) for p in positions[:3]])
    with pytest.raises(InputError, match="3 of 9 places have several different images.*several acquisitions"):
        read_volume(tmp_path / "overlap")


def test_localizers_are_left_out(tmp_path: Path) -> None:
    positions = along_z(REGULAR)
    made = series(positions)
    kind = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout = dataset((0, -200, 300), (1, 0, 0, 0, 0, -1), np.zeros((40, 30)), ImageType=kind)
    volume = read_volume(write(tmp_path / "flagged", [*made, scout]))
    assert note(volume, "1 localizer image of the series left out")
    assert volume.shape[2] == 9 and largest_error(volume.affine, positions) < 0.1
    plain = dataset((0, -200, 300), (1, 0, 0, 0, 0, -1), np.zeros((40, 30)))
    volume = read_volume(write(tmp_path / "unflagged", [*made, plain]))
    assert note(volume, "1 image of another size or orientation left out: 30 × 40")
    assert volume.shape[2] == 9 and largest_error(volume.affine, positions) < 0.1
    with pytest.raises(InputError, match="not a CT but localizer images"):
        read_volume(write(tmp_path / "alone", [scout]))
    crossed = dataset((-200, 0, 300), SAGITTAL, np.zeros((40, 30)))
    with pytest.raises(InputError, match="several sizes or orientations"):
        read_volume(write(tmp_path / "crossed", [plain, crossed]))


def test_two_stacks_of_one_series_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path, series(along_z(REGULAR))), write(tmp_path, series(ALONG_X[:6], SAGITTAL))
    with pytest.raises(InputError, match=r"several sizes or orientations.*1: CT, 9 slices.*2: CT, 6 slices"):
        read_volume(tmp_path)
    volume = read_volume(tmp_path, dicom=DicomOptions(series=2))
    assert volume.shape[2] == 6 and largest_error(volume.affine, ALONG_X[:6], SAGITTAL) < 0.1


@pytest.mark.parametrize("shift", [0.3, 2, 90])
def test_slices_shifted_in_their_plane_are_refused(tmp_path: Path, shift: float) -> None:
    for name, which in (("one", [4]), ("half", [4, 5, 6, 7, 8]), ("last", [8]), ("alternating", [1, 3, 5, 7])):
        positions = along_z(REGULAR)
        positions[which, 0] += shift
        with pytest.raises(InputError, match="shifted"):
            read_volume(write(tmp_path / name, series(positions)))


def test_positions_that_no_scanner_gives_are_refused(tmp_path: Path) -> None:
    slipping = along_z(REGULAR) + np.outer(np.arange(9), (9, 0, 0))
    with pytest.raises(InputError, match="no gantry is tilted so far"):
        read_volume(write(tmp_path / "slipping", series(slipping)))
    far = along_z([*REGULAR, 900_000.0])
    with pytest.raises(InputError, match="more than a patient's table"):
        read_volume(write(tmp_path / "far", series(far)), dicom=DicomOptions(allow_gaps=True))


@pytest.mark.parametrize("change", [None, ""])
@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_slices_that_do_not_say_where_they_lie_are_refused(tmp_path: Path, keyword: str, change: str | None) -> None:
    made = series(along_z(REGULAR), **{keyword: change})
    with pytest.raises(InputError, match=f"does not say where its slices lie: 9 files have no valid {keyword}"):
        read_volume(write(tmp_path / "all", made))
    made = series(along_z(REGULAR))
    if change is None:
        delattr(made[4], keyword)
    else:
        setattr(made[4], keyword, change)
    with pytest.raises(InputError, match=rf"1 slice cannot be read: 005.dcm \(no valid {keyword}\)"):
        read_volume(write(tmp_path / "one", made))
    volume = read_volume(tmp_path / "one", dicom=DicomOptions(allow_damaged=True))
    assert (
        volume.shape[2] == 9 and note(volume, "005.dcm") and note(volume, "seem to be missing: about 1 after slice 4")
    )


def test_nonsense_in_the_geometry_is_refused(tmp_path: Path) -> None:
    nonsense = {
        "ImageOrientationPatient": [1, 0, 0, 1, 0, 0],
        "PixelSpacing": [0, 1.5],
        "ImagePositionPatient": [1.0, 2.0],
    }
    for keyword, value in nonsense.items():
        with pytest.raises(InputError, match=f"no valid {keyword}"):
            read_volume(write(tmp_path / keyword, series(along_z(REGULAR), **{keyword: value})))


@pytest.mark.parametrize("order", [range(9), range(8, -1, -1), [3, 1, 4, 0, 5, 8, 2, 6, 7]])
@pytest.mark.parametrize("orientation", [AXIAL, tilted(15)], ids=["straight", "tilted"])
def test_enhanced_ct(tmp_path: Path, order: Any, orientation: Any) -> None:
    positions = along_z(REGULAR)
    folder = write(tmp_path, [enhanced(positions, orientation, order)])
    for given in (folder, folder / "001.dcm"):
        volume = read_volume(given)
        assert volume.shape == (COLUMNS, ROWS, 9)
        assert largest_error(volume.affine, positions, orientation) < 0.1
        assert largest_hu_error(volume.array, volume.affine) < 1.1


def test_enhanced_ct_with_a_missing_frame_and_two_files(tmp_path: Path) -> None:
    positions = along_z(np.delete(REGULAR, 4))
    volume = read_volume(write(tmp_path / "gap", [enhanced(positions)]))
    assert note(volume, "seem to be missing") and largest_error(volume.affine, positions) < 0.1
    parts = [enhanced(along_z(REGULAR)[:5]), enhanced(along_z(REGULAR)[5:])]
    volume = read_volume(write(tmp_path / "parts", parts))
    assert volume.shape[2] == 9 and largest_hu_error(volume.array, volume.affine) < 1.1
    broken = enhanced(along_z(REGULAR))
    broken.PerFrameFunctionalGroupsSequence = broken.PerFrameFunctionalGroupsSequence[:7]
    with pytest.raises(InputError, match="describes 7 of 9 frames"):
        read_volume(write(tmp_path / "broken", [broken]))


def test_one_slice(tmp_path: Path) -> None:
    one = along_z([0])
    volume = read_volume(write(tmp_path / "one", series(one)))
    assert volume.shape == (COLUMNS, ROWS, 1) and volume.spacing[2] == 3 and note(volume, "one slice")
    assert largest_error(volume.affine, one) < 1e-6
    with pytest.raises(InputError, match="no thickness"):
        read_volume(write(tmp_path / "no", series(one, SliceThickness=None)))
    with pytest.raises(InputError, match="one slice of a series"):
        read_volume(tmp_path / "one" / "001.dcm")


def test_the_jpeg2000_series_is_read_as_simpleitk_reads_it(ct_data: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    folder = ct_data / "torso" / "ts_dicom_jpeg2000"
    if not folder.is_dir():
        pytest.skip("the series is not among the test data")
    volume = read_volume(folder)
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(image).transpose(2, 1, 0))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    np.testing.assert_allclose(volume.affine, np.diag([-1.0, -1, 1, 1]) @ affine, atol=1e-3)
