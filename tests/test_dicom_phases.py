"""Several images at one place: copies are dropped, phases are chosen by an attribute of the headers, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_series import COLUMNS, ROWS, along_z, dataset, enhanced, series, write
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from mome.errors import InputError
from mome.volumes import read_volume

POSITIONS = along_z(np.arange(8) * 3.0)
VALUES = (100.0, -200.0)


def phase(value: float, **changes: Any) -> list[Any]:
    return [dataset(p, hu=np.full((ROWS, COLUMNS), value), **changes) for p in POSITIONS]


def interleaved(*phases: list[Any]) -> list[Any]:
    return [image for images in zip(*phases, strict=True) for image in images]


def numbered(images: list[Any], start: int = 1) -> list[Any]:
    for number, image in enumerate(images, start):
        image.InstanceNumber = number
    return images


TOLD_APART: dict[str, tuple[Any, Any]] = {
    "AcquisitionNumber": (3, 4),
    "TemporalPositionIdentifier": (1, 2),
    "TriggerTime": (0, 450),
    "ContentTime": ("101500.5", "101730"),
    "AcquisitionTime": ("101500.5", "101730"),
    "NominalPercentageOfCardiacPhase": (40, 75),
    "ImageType": (["ORIGINAL", "PRIMARY", "AXIAL", "A"], ["ORIGINAL", "PRIMARY", "AXIAL", "B"]),
    "KVP": (80, 140),
}


@pytest.mark.parametrize("name", TOLD_APART)
def test_interleaved_phases_are_chosen_by_what_tells_them_apart(tmp_path: Path, name: str) -> None:
    """The instance numbers take turns at places in an order that a reader must not trust."""
    first, second = (phase(value, **{name: v}) for value, v in zip(VALUES, TOLD_APART[name], strict=True))
    pairs = enumerate(zip(first, second, strict=True))
    write(tmp_path, numbered([image for k, pair in pairs for image in (pair if k % 3 else pair[::-1])]))
    with pytest.raises(InputError, match=rf"8 of 8 places.*2 time points.*differ in {name}(.*\n){{2}}.*--frame"):
        read_volume(tmp_path)
    for frame in (0, 1):
        volume = read_volume(tmp_path, frame=frame)
        assert set(np.unique(volume.array)) == {VALUES[frame]} and volume.shape[2] == 8
        assert any(f"time point {frame} is read" in note and name in note for note in volume.notes)
    for frame in (-1, 2):
        with pytest.raises(InputError, match="choose one from 0 to 1"):
            read_volume(tmp_path, frame=frame)


def test_phases_are_named(tmp_path: Path) -> None:
    write(tmp_path, phase(100, AcquisitionNumber=3) + phase(200, AcquisitionNumber=7))
    with pytest.raises(InputError, match="AcquisitionNumber: 3, 7"):
        read_volume(tmp_path)


@pytest.mark.parametrize("frame", [None, 0, 1])
def test_phases_that_nothing_tells_apart_are_refused(tmp_path: Path, frame: int | None) -> None:
    write(tmp_path / "turns", numbered(interleaved(phase(100), phase(200))))
    write(tmp_path / "equal", interleaved(phase(100), phase(200)))
    mixed = interleaved(phase(100, AcquisitionNumber=1), phase(200, AcquisitionNumber=2))
    mixed[4].AcquisitionNumber = 2  # one place has the same number twice
    for number, image in enumerate(mixed):
        image.ContentTime = f"10{number % 3:02d}00"
    write(tmp_path / "mixed", mixed)
    for name in ("turns", "equal", "mixed"):
        with pytest.raises(InputError, match="8 of 8 places .* no attribute in the headers tells them apart"):
            read_volume(tmp_path / name, frame=frame)


def test_blocks_of_instance_numbers_are_phases(tmp_path: Path) -> None:
    write(tmp_path, numbered(phase(100)) + numbered(phase(200), 9))
    with pytest.raises(InputError, match="InstanceNumber: 1–8, 9–16"):
        read_volume(tmp_path)
    assert set(np.unique(read_volume(tmp_path, frame=1).array)) == {200}


def test_copies_of_some_slices_of_two_phases(tmp_path: Path) -> None:
    first, second = phase(100, AcquisitionNumber=1), phase(200, AcquisitionNumber=2)
    write(tmp_path, [*first, *second, *phase(100, AcquisitionNumber=1)[:3]])
    assert set(np.unique(read_volume(tmp_path, frame=0).array)) == {100}
    with pytest.raises(InputError, match="AcquisitionNumber: 1, 2"):
        read_volume(tmp_path)


@pytest.mark.parametrize("different", [0, 3, 7])
def test_one_pixel_that_differs_is_no_copy(tmp_path: Path, different: int) -> None:
    made = phase(100)
    made[different].PixelData = b"\1\0" + made[different].PixelData[2:]
    write(tmp_path, phase(100) + made)
    with pytest.raises(InputError, match="1 of 8 places have several different images"):
        read_volume(tmp_path)


@pytest.mark.parametrize("name", ["AcquisitionNumber", "TemporalPositionIdentifier", "ImageType", "KVP"])
def test_phases_at_places_between_each_other_are_refused(tmp_path: Path, name: str) -> None:
    made = series(along_z(np.arange(12) * 1.5))
    for k, image in enumerate(made):
        setattr(image, name, TOLD_APART[name][k % 2])
    with pytest.raises(InputError, match=f"several acquisitions or phases take turns: {name} is"):
        read_volume(write(tmp_path / "turns", made))
    for k, image in enumerate(made):
        setattr(image, name, TOLD_APART[name][k // 6])
    assert read_volume(write(tmp_path / "one after the other", made)).shape[2] == 12


def test_an_acquisition_number_for_every_slice_is_one_volume(tmp_path: Path) -> None:
    made = series(POSITIONS)
    for k, image in enumerate(made):
        image.AcquisitionNumber = k
    assert read_volume(write(tmp_path, made)).shape[2] == 8


@pytest.mark.parametrize("shift", [0.02, 0.1, 0.5, 2.95])
def test_phases_at_almost_one_place_are_refused(tmp_path: Path, shift: float) -> None:
    heights = np.concatenate([np.arange(8) * 3.0, np.arange(8) * 3.0 + shift])
    with pytest.raises(InputError, match="two acquisitions"):
        read_volume(write(tmp_path, series(along_z(heights))))


def test_instance_numbers_that_pass_twice_are_noted(tmp_path: Path) -> None:
    def has_note(folder: Path) -> bool:
        return any("pass 2 times over the same places" in note for note in read_volume(folder).notes)

    heights = np.concatenate([np.arange(6) * 3.0, np.arange(6) * 3.0 + 1.5])
    assert has_note(write(tmp_path / "twice", series(along_z(heights))))
    assert not has_note(write(tmp_path / "once", series(along_z(np.arange(12) * 1.5))))
    assert not has_note(write(tmp_path / "reversed", series(along_z(np.arange(12)[::-1] * 1.5))))


def test_frames_of_an_enhanced_ct_are_phases(tmp_path: Path) -> None:
    both = np.repeat(POSITIONS, 2, axis=0)
    image = enhanced(both)
    image.PixelData = np.tile(np.array([1124, 824], "<i2")[:, None], (8, ROWS * COLUMNS)).tobytes()
    for k, frame in enumerate(image.PerFrameFunctionalGroupsSequence):
        content = Dataset()
        content.TemporalPositionIndex = k % 2 + 1
        frame.FrameContentSequence = Sequence([content])
    write(tmp_path, [image])
    with pytest.raises(InputError, match="TemporalPositionIdentifier: 1, 2"):
        read_volume(tmp_path)
    assert set(np.unique(read_volume(tmp_path, frame=1).array)) == {-200}


@pytest.mark.parametrize("name", ["SliceThickness", "SeriesNumber"])
def test_reconstructions_that_take_turns_are_refused(tmp_path: Path, name: str) -> None:
    made = series(along_z(np.arange(12) * 1.5))
    for k, image in enumerate(made):
        setattr(image, name, 3 + k % 2)
    with pytest.raises(InputError, match=f"take turns: {name} is 3, 4"):
        read_volume(write(tmp_path, made))


def test_one_slice_of_another_acquisition_is_noted(tmp_path: Path) -> None:
    made = series(POSITIONS, AcquisitionNumber=1)
    made[4].AcquisitionNumber = 2
    volume = read_volume(write(tmp_path, made))
    assert any("differ in AcquisitionNumber lie between the others: 1, 2" in note for note in volume.notes)


def test_slices_that_all_state_one_place_are_refused(tmp_path: Path) -> None:
    made = series(POSITIONS)
    for image in made:
        image.ImagePositionPatient = [0, 0, 0]
    for frame in (None, 0):
        with pytest.raises(InputError, match="all 8 slices state the same place"):
            read_volume(write(tmp_path / str(frame), made), frame=frame)


def test_series_without_a_uid_are_told_apart_by_number(tmp_path: Path) -> None:
    write(tmp_path / "two", series(POSITIONS, SeriesInstanceUID=None))
    assert any("no SeriesInstanceUID" in note for note in read_volume(tmp_path / "two").notes)
    write(tmp_path / "two", series(POSITIONS + (0, 0, 24), SeriesInstanceUID=None, SeriesNumber=3))
    with pytest.raises(InputError, match="holds 2 DICOM series|one series of images"):
        read_volume(tmp_path / "two")


def test_damaged_files_of_another_series_are_noted(tmp_path: Path) -> None:
    write(tmp_path, series(POSITIONS))
    write(tmp_path, series(POSITIONS[:2], SeriesInstanceUID="1.2.9"))
    for path in sorted(tmp_path.iterdir())[-2:]:
        path.write_bytes(path.read_bytes()[:-20])
    assert any("2 damaged files name another series" in note for note in read_volume(tmp_path).notes)
