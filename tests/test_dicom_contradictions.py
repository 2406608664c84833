"""Headers that contradict themselves or the positions of the slices: refused, or used with a note."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_series import AXIAL, along_z, dataset, enhanced, largest_error, largest_hu_error, series, tilted, write
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from mome.errors import InputError
from mome.volumes import read_volume
from mome.volumes.dicom import DicomOptions

POSITIONS = along_z(np.arange(8) * 3.0)


def notes(made: list[Any], folder: Path) -> str:
    volume = read_volume(write(folder, made))
    positions = np.array([image.ImagePositionPatient for image in made], dtype=float)
    orientation = [float(value) for value in made[0].ImageOrientationPatient]
    assert largest_error(volume.affine, positions, orientation) < 0.1
    assert largest_hu_error(volume.array, volume.affine) < 1.1
    return "\n".join(volume.notes)


# -- lengths and angles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [10, 100, 1000])
@pytest.mark.parametrize("keep", ["SliceThickness", "SpacingBetweenSlices", None])
def test_positions_in_another_unit_are_refused(tmp_path: Path, factor: float, keep: str | None) -> None:
    lengths = {"SliceThickness": None, "SpacingBetweenSlices": None, **({keep: 2} if keep else {})}
    with pytest.raises(InputError, match="mm apart by their positions, but .* mm"):
        read_volume(write(tmp_path, series(along_z(np.arange(8) * 2.0) / factor, **lengths)))


def test_pixels_in_another_unit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="24 mm wide by PixelSpacing, but ReconstructionDiameter is 240 mm"):
        read_volume(write(tmp_path / "cm", series(POSITIONS, ReconstructionDiameter=240)))
    assert "wide" not in notes(series(POSITIONS, ReconstructionDiameter=40), tmp_path / "cropped")


@pytest.mark.parametrize(("step", "thickness"), [(0.5, 0.5), (1, 5), (0.7, 5), (0.4, 0.6), (5, 5), (10, 1)])
def test_steps_of_scanners_are_read(tmp_path: Path, step: float, thickness: float) -> None:
    found = notes(series(along_z(np.arange(8) * step), SliceThickness=thickness), tmp_path)
    assert ("slices may be missing" in found) == (step > 5)


def test_lengths_that_contradict_positions_are_noted(tmp_path: Path) -> None:
    assert "SpacingBetweenSlices is 5 mm, but slices are 3 mm" in notes(
        series(POSITIONS, SpacingBetweenSlices=5), tmp_path / "spacing"
    )
    assert "are 1 mm thick and 3 mm apart" in notes(series(POSITIONS, SliceThickness=1), tmp_path / "thin")
    assert "SpacingBetween" not in notes(series(POSITIONS, SpacingBetweenSlices=-3), tmp_path / "negative")
    made = series(POSITIONS)
    made[3].SliceThickness = 5
    assert "SliceThickness differs" in notes(made, tmp_path / "differs")


def test_the_tilt_of_the_header_against_positions(tmp_path: Path) -> None:
    words = "GantryDetectorTilt is 15°, but by the positions of the slices the tilt is 0.0°"
    assert words in notes(series(POSITIONS, GantryDetectorTilt=15), tmp_path / "untilted")
    assert "GantryDetectorTilt" not in notes(series(POSITIONS, tilted(15), GantryDetectorTilt=15), tmp_path / "a")
    assert "GantryDetectorTilt" not in notes(series(POSITIONS, tilted(15), GantryDetectorTilt=-15), tmp_path / "b")
    assert "GantryDetectorTilt" in notes(series(POSITIONS, tilted(15), GantryDetectorTilt=0), tmp_path / "c")


def test_one_tilt_that_contradicts_is_noted(tmp_path: Path) -> None:
    made = series(POSITIONS, GantryDetectorTilt=0)
    made[5].GantryDetectorTilt = 12
    assert "GantryDetectorTilt is 12°" in notes(made, tmp_path)


@pytest.mark.parametrize("position", ["HFS", "HFP", "FFS", "FFP", "HFDR", "FFDL", ""])
def test_the_position_of_the_patient_flips_nothing(tmp_path: Path, position: str) -> None:
    """ImageOrientationPatient holds the patient's position already."""
    orientation = (-1, 0, 0, 0, -1, 0) if position.endswith("P") else AXIAL
    notes(series(POSITIONS, orientation, PatientPosition=position), tmp_path)


def test_animals_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="QUADRUPED"):
        read_volume(write(tmp_path / "dog", series(POSITIONS, AnatomicalOrientationType="QUADRUPED")))
    notes(series(POSITIONS, AnatomicalOrientationType="BIPED"), tmp_path / "biped")


@pytest.mark.parametrize("other", ["ImagerPixelSpacing", "NominalScannedPixelSpacing"])
def test_other_pixel_spacings_are_not_used(tmp_path: Path, other: str) -> None:
    with pytest.raises(InputError, match="no valid PixelSpacing"):
        read_volume(write(tmp_path, series(POSITIONS, PixelSpacing=None, **{other: [2, 1.5]})))


def test_images_that_the_header_counts(tmp_path: Path) -> None:
    assert "ImagesInAcquisition is 9, but the series has 8" in notes(
        series(POSITIONS, ImagesInAcquisition=9), tmp_path / "more"
    )
    assert "ImagesInAcquisition" not in notes(series(POSITIONS, ImagesInAcquisition=8), tmp_path / "as many")


def test_missing_files_of_a_concatenation_are_refused(tmp_path: Path) -> None:
    parts = [enhanced(POSITIONS[k : k + 2], ConcatenationUID="1.2.77") for k in range(0, 8, 2)]
    for number, part in enumerate(parts, 1):
        part.InConcatenationNumber, part.InConcatenationTotalNumber = number, 4
    assert read_volume(write(tmp_path / "whole", parts)).shape[2] == 8
    write(tmp_path / "last missing", parts[:3])
    with pytest.raises(InputError, match="3 of 4 files of a multi-frame image that was split"):
        read_volume(tmp_path / "last missing")
    volume = read_volume(tmp_path / "last missing", dicom=DicomOptions(allow_damaged=True))
    assert volume.shape[2] == 6 and any("3 of 4 files" in note for note in volume.notes)


# -- values ----------------------------------------------------------------------------------------------------


def rewritten(made: list[Any], change: Any, **elements: Any) -> list[Any]:
    """Changes the stored values, as unsigned 16-bit numbers, and elements of slices."""
    for image in made:
        image.PixelData = change(np.frombuffer(image.PixelData, "<u2")).astype("<u2").tobytes()
        for name, value in elements.items():
            setattr(image, name, value)
    return made


@pytest.mark.parametrize("signed", [0, 1])
def test_values_in_the_upper_bits(tmp_path: Path, signed: int) -> None:
    """A 12-bit value that ends at HighBit 15 lies 4 bits higher; earlier editions of the standard allowed it."""
    intercept = 0 if signed else -1024
    made = series(POSITIONS, PixelRepresentation=signed, RescaleIntercept=intercept)
    shifted = rewritten(made, lambda stored: (stored << 4) & 0xFFFF, BitsStored=12, HighBit=15)
    assert "HighBit is not BitsStored − 1" in notes(shifted, tmp_path / "all")
    for image in shifted:
        image.PixelData = ((np.frombuffer(image.PixelData, "<u2") >> 2) & 0x3FFF).tobytes()
        image.HighBit = 13
    notes(shifted, tmp_path / "13")


def test_values_in_the_lower_bits_in_spite_of_high_bit_are_refused(tmp_path: Path) -> None:
    made = series(POSITIONS, PixelRepresentation=0, BitsStored=12, HighBit=15)
    with pytest.raises(InputError, match="lowest 4 bits of a pixel are unused, but they are not 0"):
        read_volume(write(tmp_path, made))


def test_an_overlay_below_the_value_is_no_value(tmp_path: Path) -> None:
    made = series(POSITIONS, PixelRepresentation=0)
    rewritten(made, lambda stored: (stored << 4) | 1, BitsStored=12, HighBit=15)
    for image in made:
        image.add_new((0x6000, 0x0100), "US", 16)
        image.add_new((0x6000, 0x0102), "US", 0)
    notes(made, tmp_path)


def test_overlays_above_signed_values(tmp_path: Path) -> None:
    low = along_z(np.arange(8) * 3.0, (-7.25, -11.5, -30.0))  # HU from −140 upwards

    def made(change: Any) -> list[Any]:
        return rewritten(series(low, RescaleIntercept=0), change, BitsStored=12, HighBit=11)

    without_sign = made(lambda stored: stored & 0x0FFF)
    assert any((np.frombuffer(image.PixelData, "<u2") & 0x0800).any() for image in without_sign)
    assert "above HighBit" not in notes(without_sign, tmp_path / "without a sign")
    assert "960 pixels have bits above HighBit" in notes(made(lambda s: (s & 0x0FFF) | 0x4000), tmp_path / "overlay")


@pytest.mark.parametrize("bits", [(0, 15), (12, 10), (17, 16), (12, 16), (16, 11)])
def test_bits_that_contradict_each_other_are_refused(tmp_path: Path, bits: tuple[int, int]) -> None:
    made = series(POSITIONS)
    made[2].BitsStored, made[2].HighBit = bits
    with pytest.raises(InputError, match="1 slice cannot be read: 006.dcm .*BitsStored.*a contradiction"):
        read_volume(write(tmp_path, made))


def test_padding_of_most_pixels_is_doubted(tmp_path: Path) -> None:
    made = series(POSITIONS)
    for image in made:
        image.add_new("PixelPaddingValue", "SS", -1000)
        image.add_new("PixelPaddingRangeLimit", "SS", 3000)
    volume = read_volume(write(tmp_path, made))
    assert any("is PixelPaddingValue right?" in note for note in volume.notes)


@pytest.mark.parametrize("value", ["0", "-1", "NaN", "inf", "", "x"])
@pytest.mark.filterwarnings("ignore")
def test_slopes_that_are_no_slope_are_refused(tmp_path: Path, value: str) -> None:
    made = series(POSITIONS)
    for image in made:
        del image.RescaleSlope
        # Bytes, because pydicom does not write what is no number.
        image.add_new((0x0028, 0x1053), "LO", value)
    write(tmp_path / "all", made)
    for path in (tmp_path / "all").iterdir():
        path.write_bytes(path.read_bytes().replace(b"\x28\x00\x53\x10LO", b"\x28\x00\x53\x10DS"))
    with pytest.raises(InputError, match="slope is 0|slope is negative|no slice has both a valid RescaleSlope"):
        read_volume(tmp_path / "all")


@pytest.mark.parametrize("keyword", ["RescaleSlope", "RescaleIntercept"])
def test_one_of_slope_and_intercept_is_not_enough(tmp_path: Path, keyword: str) -> None:
    with pytest.raises(InputError, match="no slice has both a valid RescaleSlope and"):
        read_volume(write(tmp_path, series(POSITIONS, **{keyword: None})))


def test_slopes_that_differ_are_noted(tmp_path: Path) -> None:
    made = [dataset(p, RescaleSlope=0.5 + k % 2) for k, p in enumerate(POSITIONS)]
    assert "RescaleSlope or RescaleIntercept differs between slices" in notes(made, tmp_path)


def test_pixels_of_another_size_are_refused(tmp_path: Path) -> None:
    """A header of half the rows would give an image of the upper half, or of every second row."""
    made = series(POSITIONS)
    made[3].PixelData = made[3].PixelData * 2
    with pytest.raises(InputError, match="1 slice cannot be read: 005.dcm .more pixels than its header says"):
        read_volume(write(tmp_path / "twice", made))
    made[3].PixelData = made[0].PixelData + b"\0\0"
    assert read_volume(write(tmp_path / "padded", made)).shape[2] == 8


def test_slices_of_one_value_and_copies_are_noted(tmp_path: Path) -> None:
    made = series(POSITIONS)
    made[3].PixelData = bytes(len(made[3].PixelData))
    made[5].PixelData = made[6].PixelData
    found = "\n".join(read_volume(write(tmp_path, made)).notes)
    assert "1 slices have one value everywhere, as slice 4, -1024 HU" in found and "1 slices have the same pix" in found


def test_lossy_compression_is_noted(tmp_path: Path) -> None:
    assert "compressed with loss" in notes(series(POSITIONS, LossyImageCompression="01"), tmp_path / "lossy")
    assert "compressed with loss" not in notes(series(POSITIONS, LossyImageCompression="00"), tmp_path / "lossless")


def test_unsigned_pixels_that_are_signed_are_noted(tmp_path: Path) -> None:
    made = rewritten(series(POSITIONS), lambda stored: stored - 1400, PixelRepresentation=0)
    volume = read_volume(write(tmp_path, made))
    assert any("is PixelRepresentation right?" in note for note in volume.notes)


def test_monochrome1_is_noted_and_not_inverted(tmp_path: Path) -> None:
    assert "HU are not inverted" in notes(series(POSITIONS, PhotometricInterpretation="MONOCHROME1"), tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["SCREEN SAVE", "SUBTRACTION", "MAT_SPECIFIC", "MAX_IP"])
def test_images_of_other_values_are_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match="no CT in HU"):
        read_volume(write(tmp_path, series(POSITIONS, ImageType=["DERIVED", "SECONDARY", "AXIAL", kind])))


def test_a_lookup_table_is_refused(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [2, 0, 16], [0, 1]
    table["LUTDescriptor"].VR = "US"
    table["LUTData"].VR = "US"
    with pytest.raises(InputError, match="a lookup table"):
        read_volume(write(tmp_path, series(POSITIONS, ModalityLUTSequence=Sequence([table]))))


def test_slope_and_intercept_of_every_frame(tmp_path: Path) -> None:
    image = enhanced(POSITIONS)
    stored = np.frombuffer(image.PixelData, "<i2").reshape(8, -1) - 1024.0
    for k, frame in enumerate(image.PerFrameFunctionalGroupsSequence):
        rescale = Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 0.5 + k % 3, -100 * k, "HU"
        frame.PixelValueTransformationSequence = Sequence([rescale])
        stored[k] = (stored[k] + 100 * k) / (0.5 + k % 3)
    image.PixelData = np.round(stored).astype("<i2").tobytes()
    volume = read_volume(write(tmp_path / "good", [image]))
    assert largest_hu_error(volume.array, volume.affine) < 2.6  # half a slope, and rounding
    image.PerFrameFunctionalGroupsSequence[3].PixelValueTransformationSequence[0].RescaleSlope = 0
    with pytest.raises(InputError, match="slope is 0"):
        read_volume(write(tmp_path / "zero", [image]))
