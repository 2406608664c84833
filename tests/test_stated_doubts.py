"""What headers of DICOM state beside geometry is said or refused, and deflated files are bounded."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_series import ENHANCED_CT, along_z, dataset, enhanced, series, write
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian

from mome.errors import InputError
from mome.volumes import Volume, checked_volume, read_volume
from mome.volumes.dicom.damaged import DamagedFile
from mome.volumes.dicom.deflated import check_inflated_size

POSITIONS = along_z(np.arange(6) * 3.0)
NOTES: dict[str, tuple[dict[str, Any], str]] = {
    "kilovolts": ({"KVP": 5000}, "KVP is 5000 kV"),
    "no kilovolts": ({"KVP": 1}, "KVP is 1 kV"),
    "bone removed": ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "BONE_REMOVED"]}, "processed (BONE_REMOVED)"),
    "contrast removed": ({"ImageType": ["DERIVED", "PRIMARY", "VNC"]}, "processed (VNC)"),
    "190 keV": (
        {"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "MONO_190KEV"]},
        "monoenergetic reconstruction at 190 keV",
    ),
    "in the description": ({"SeriesDescription": "Thorax Mono 40 keV"}, "monoenergetic reconstruction at 40 keV"),
    "burned in": ({"BurnedInAnnotation": "YES"}, "text may be drawn"),
    "dog": ({"PatientSpeciesDescription": "Canis lupus familiaris"}, "names an animal"),
    "cone beam": ({"ManufacturerModelName": "On-Board Imager"}, "cone-beam CT"),
    "cone beam option": ({"ScanOptions": "CONE BEAM"}, "cone-beam CT"),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "log": ({"PixelIntensityRelationship": "LOG"}, "PixelIntensityRelationship is LOG"),
    "PET": ({"Units": "BQML"}, "Units is BQML"),
}


@pytest.mark.parametrize("name", NOTES)
@pytest.mark.filterwarnings("ignore")
def test_statements_are_noted(tmp_path: Path, name: str) -> None:
    changes, words = NOTES[name]
    notes = read_volume(write(tmp_path, series(POSITIONS, **changes))).notes
    assert sum(words in note for note in notes) == 1, notes


def test_usual_statements_are_not_noted(tmp_path: Path) -> None:
    plain = read_volume(write(tmp_path / "plain", series(POSITIONS))).notes
    usual = {"KVP": 120, "BurnedInAnnotation": "NO", "ManufacturerModelName": "SOMATOM", "ScanOptions": "HELIX"}
    made = series(POSITIONS, PatientSpeciesDescription="Homo sapiens", PixelIntensityRelationship="LIN", **usual)
    for image, position in zip(made, POSITIONS, strict=True):
        image.SliceLocation = -float(position[2]) + 100
    assert read_volume(write(tmp_path / "usual", made)).notes == plain


@pytest.mark.parametrize("name", REFUSED)
def test_other_quantities_are_refused(tmp_path: Path, name: str) -> None:
    changes, words = REFUSED[name]
    with pytest.raises(InputError, match=f"no CT in HU: .*{words}"):
        read_volume(write(tmp_path, series(POSITIONS, **changes)))


def mapping(code: str) -> Sequence:
    unit, item = Dataset(), Dataset()
    unit.CodeValue, unit.CodingSchemeDesignator, unit.CodeMeaning = code, "UCUM", code
    item.MeasurementUnitsCodeSequence = Sequence([unit])
    return Sequence([item])


def test_real_world_values_in_other_units_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="RealWorldValueMappingSequence gives values in mg/cm3"):
        read_volume(write(tmp_path / "a", series(POSITIONS, RealWorldValueMappingSequence=mapping("mg/cm3"))))
    made = enhanced(POSITIONS)
    made.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence = mapping("g/ml{SUVbw}")
    assert made.SOPClassUID == ENHANCED_CT
    with pytest.raises(InputError, match="gives values in g/ml"):
        read_volume(write(tmp_path / "b", [made]))
    series_in_hu = series(POSITIONS, RealWorldValueMappingSequence=mapping("[hnsf'U]"))
    assert read_volume(write(tmp_path / "c", series_in_hu)).shape[2] == 6


def test_a_contradicting_slice_location_is_noted(tmp_path: Path) -> None:
    made = series(POSITIONS)
    for number, image in enumerate(made):
        image.SliceLocation = 7.0 * number
    notes = read_volume(write(tmp_path, made)).notes
    assert any("SliceLocation places slices up to 20 mm elsewhere" in note for note in notes), notes


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def test_deflated_files_inflate_to_what_their_header_needs(tmp_path: Path) -> None:
    made = series(POSITIONS)
    for image in made:
        image.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    assert read_volume(write(tmp_path, made)).shape[2] == 6
    check_inflated_size(deflated(bytes(1 << 20)))
    with pytest.raises(DamagedFile, match="inflates to more than the 17 MB"):
        check_inflated_size(deflated(bytes(40 << 20)))
    bomb = dataset(POSITIONS[0])
    bomb.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    bomb.PixelData = bytes(60 << 20)
    write(tmp_path / "bomb", [bomb])
    with pytest.raises(InputError, match="inflates to more than the 17 MB that its header accounts for"):
        read_volume(tmp_path / "bomb")


def with_meta(image: Dataset) -> Dataset:
    """A copy that does not remember in which order its bytes were."""
    made = Dataset()
    made.update(image)
    made.file_meta, made.preamble = image.file_meta, image.preamble
    return made


def test_big_endian_series_are_read(tmp_path: Path) -> None:
    little = read_volume(write(tmp_path / "little", series(POSITIONS)))
    made = series(POSITIONS)
    for image in made:
        image.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        image.PixelData = np.frombuffer(image.PixelData, "<i2").astype(">i2").tobytes()
        image["PixelData"].VR = "OW"
    folder = tmp_path / "big"
    folder.mkdir()
    for number, image in enumerate(made):
        image = with_meta(image)
        image.save_as(folder / f"{number}.dcm", implicit_vr=False, little_endian=False, enforce_file_format=True)
    big = read_volume(folder)
    np.testing.assert_array_equal(big.array, little.array)
    np.testing.assert_allclose(big.affine, little.affine)


def test_fields_of_view_that_are_no_patients() -> None:
    rng = np.random.default_rng(0)
    hu = np.where(np.indices((64, 64, 8))[0] < 12, -1000.0, 45.0) + rng.normal(0, 12, (64, 64, 8))
    for spacing, words in (((0.3, 0.3, 5.0), "field of view is 1.9 cm"), ((18.0, 18.0, 5.0), "field of view is 1.2 m")):
        notes = checked_volume(Volume(hu, np.diag([*spacing, 1.0]))).notes
        assert any(words in note for note in notes), notes
    assert not any("field of view" in note for note in checked_volume(Volume(hu, np.diag([4.0, 4.0, 5.0, 1.0]))).notes)
