"""DICOM SEG: every pixel lies where its mask does in the world, for every kind of series, in independent readers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_readback import ball, dice_in_world, mask_set, masks_of_seg, seg_numbers, source_places
from dicom_series import AXIAL, COLUMNS, ROWS, along_z, dataset, enhanced, series, tilted, write
from test_dicom_geometry import IRREGULAR, REGULAR, REGULAR_SERIES

from mome.errors import InputError
from mome.volumes import Volume, read_volume
from mome.volumes.dicom import DicomOptions
from mome.volumes.writers.base import build_writer

pytest.importorskip("highdicom", reason='pip install "mome[dicom]"')

FRAME_OF_REFERENCE = "1.2.826.9"


def middle(volume: Volume) -> np.ndarray:
    """LPS mm of the middle of a volume, a little off to one side, so that no mirror image has the same mask."""
    at = (np.asarray(volume.shape) - 1) * (0.4, 0.55, 0.45)
    return (volume.affine[:3, :3] @ at + volume.affine[:3, 3]) * (-1, -1, 1)


def wrote(folder: Path, out: Path, spec: str = "dicom_seg", **bodies: Any) -> tuple[Path, list[str]]:
    volume = read_volume(folder)
    centre = middle(volume)
    bodies = bodies or {"liver": ball(centre, (4, 5, 6)), "kidney_left": ball(centre + (0, 0, 9), (3.5, 4, 2.9))}
    path = out / "ct_seg.dcm"
    notes = build_writer(spec).write(path, mask_set(volume, folder, **bodies))
    return path, list(notes or ())


@pytest.mark.parametrize("spec", ["dicom_seg", "dicom_seg(kind=binary)"])
@pytest.mark.parametrize("name", REGULAR_SERIES)
def test_regular_series(tmp_path: Path, name: str, spec: str) -> None:
    orientation, positions = REGULAR_SERIES[name]
    folder = write(tmp_path / "ct", series(positions, orientation, FrameOfReferenceUID=FRAME_OF_REFERENCE))
    body = ball(middle(read_volume(folder)), (4, 5, 6))
    path, notes = wrote(folder, tmp_path, spec, liver=body)
    source = source_places(folder)
    # Where positions are rounded, the planes of the volume lie up to 0.05 mm beside the slices.
    least = 0.99 if name.startswith("rounded") else 1
    assert dice_in_world(masks_of_seg(path, source)["liver"], source, body) >= least and notes == []
    seg = pydicom.dcmread(path)
    assert seg.FrameOfReferenceUID == FRAME_OF_REFERENCE and seg.StudyInstanceUID == "1.2.3"
    assert seg.SOPClassUID == f"1.2.840.10008.5.1.4.1.1.66.{4 if 'binary' in spec else 7}"
    assert seg.file_meta.TransferSyntaxUID == ("1.2.840.10008.1.2.1" if "binary" in spec else "1.2.840.10008.1.2.5")
    listed = {item.ReferencedSOPInstanceUID for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert listed == {uid for uid, _ in source}


@pytest.mark.parametrize("name", IRREGULAR)
@pytest.mark.parametrize("orientation", [AXIAL, tilted(12)], ids=["straight", "tilted"])
def test_irregular_series_get_the_masks_at_their_slices(tmp_path: Path, name: str, orientation: Any) -> None:
    slices = series(along_z(IRREGULAR[name]), orientation, FrameOfReferenceUID=FRAME_OF_REFERENCE)
    folder = write(tmp_path / "ct", slices)
    body = ball(middle(read_volume(folder)), (5, 6, 9))
    path, notes = wrote(folder, tmp_path, liver=body)
    source = source_places(folder)
    found = dice_in_world(masks_of_seg(path, source)["liver"], source, body)
    assert found > 0.9 if name == "odd steps" else found == 1
    assert f"the series has {len(slices)} slices at irregular steps" in notes[0]
    assert ("mm away" in notes[0]) == (name == "odd steps")


def test_copies_and_slices_that_were_left_out_are_not_referred_to(tmp_path: Path) -> None:
    slices = series(along_z(REGULAR), FrameOfReferenceUID=FRAME_OF_REFERENCE)
    copies = series(along_z(REGULAR[:3]), FrameOfReferenceUID=FRAME_OF_REFERENCE)
    folder = write(tmp_path / "ct", slices + copies)
    broken = folder / "004.dcm"
    whole = broken.read_bytes()
    left_out = str(pydicom.dcmread(broken).SOPInstanceUID)
    broken.write_bytes(whole[:-60])
    volume = read_volume(folder, dicom=DicomOptions(allow_damaged=True))
    centre = middle(volume)
    path = tmp_path / "seg.dcm"
    build_writer("dicom_seg").write(path, mask_set(volume, folder, liver=ball(centre, (4, 5, 9))))
    seg = pydicom.dcmread(path)
    listed = [item.ReferencedSOPInstanceUID for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence]
    assert len(listed) == len(set(listed)) == 8 and left_out not in listed
    broken.write_bytes(whole)
    kept = {key: places for key, places in source_places(folder).items() if key[0] in listed}
    assert dice_in_world(masks_of_seg(path, kept)["liver"], kept, ball(centre, (4, 5, 9))) == 1


@pytest.mark.parametrize("spec", ["dicom_seg", "dicom_seg(kind=binary)"])
def test_enhanced_ct(tmp_path: Path, spec: str) -> None:
    """Frames in another order than their places, one of them twice."""
    order = [3, 0, 8, 1, 2, 7, 4, 6, 5, 3]
    image = enhanced(along_z(REGULAR), tilted(10), order, FrameOfReferenceUID=FRAME_OF_REFERENCE)
    folder = write(tmp_path / "ct", [image])
    body = ball(middle(read_volume(folder)), (4, 5, 6))
    path, _ = wrote(folder, tmp_path, spec, liver=body)
    source = source_places(folder)
    found = masks_of_seg(path, source)["liver"]
    del source[image.SOPInstanceUID, 10]  # the copy
    assert dice_in_world(found, source, body) == 1
    assert [item.ReferencedSOPInstanceUID for item in pydicom.dcmread(path).SourceImageSequence] == [
        image.SOPInstanceUID
    ]


@pytest.mark.parametrize("spec", ["dicom_seg", "dicom_seg(kind=binary)"])
def test_enhanced_ct_of_one_frame_per_file(tmp_path: Path, spec: str) -> None:
    """highdicom took the files for several multi-frame images, which failed after the network had run."""
    positions = along_z(REGULAR)
    slices = [enhanced(positions[k : k + 1], FrameOfReferenceUID=FRAME_OF_REFERENCE) for k in range(len(positions))]
    folder = write(tmp_path / "ct", slices)
    body = ball(middle(read_volume(folder)), (4, 5, 6))
    path, _ = wrote(folder, tmp_path, spec, liver=body)
    source = source_places(folder)
    assert dice_in_world(masks_of_seg(path, source)["liver"], source, body) == 1
    listed = pydicom.dcmread(path).ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {item.ReferencedSOPInstanceUID for item in listed} == {uid for uid, _ in source}


@pytest.mark.parametrize("number", [-2000, 0, 123_456_789])
def test_any_number_of_the_series_is_followed_by_a_valid_one(tmp_path: Path, number: int) -> None:
    slices = series(along_z(REGULAR), FrameOfReferenceUID=FRAME_OF_REFERENCE, SeriesNumber=number)
    path, _ = wrote(write(tmp_path / "ct", slices), tmp_path)
    assert 1 <= pydicom.dcmread(path).SeriesNumber <= 9999


def overlapping(folder: Path) -> dict[str, Any]:
    centre = middle(read_volume(folder))
    return {
        "liver": ball(centre, (5, 6, 8)),
        "liver_tumor": ball(centre + (1, 1, 0), (3, 3, 4)),
        "kidney_left": ball(centre + (0, 0, 10), (3, 3, 2)),
        "something odd": ball(centre + (1, 0, 1), (2, 3, 3.5)),
        "spleen": ball(centre + (900, 0, 0), (1, 1, 1)),  # nothing of it is in the scan
    }


@pytest.mark.parametrize("rows", [ROWS, 11], ids=["whole bytes", "odd bits"])
def test_overlaps_are_stored_as_bits_per_structure(tmp_path: Path, rows: int) -> None:
    positions = along_z(REGULAR)
    hu = [dataset(p).PixelData[: 2 * rows * COLUMNS] for p in positions]
    slices = series(positions, tilted(8), FrameOfReferenceUID=FRAME_OF_REFERENCE)
    for image, data in zip(slices, hu, strict=True):
        image.Rows, image.PixelData = rows, data
    folder = write(tmp_path / "ct", slices)
    bodies = overlapping(folder)
    path, notes = wrote(folder, tmp_path, **bodies)
    source, seg = source_places(folder), pydicom.dcmread(path)
    found = masks_of_seg(path, source)
    for name, body in bodies.items():
        assert found[name] == {} if name == "spleen" else dice_in_world(found[name], source, body) == 1
    assert seg.SegmentationType == "BINARY" and seg.SegmentsOverlap == "YES"
    assert seg_numbers(path) == {name: number for number, name in enumerate(bodies, 1)}
    assert any("lie in more than one mask" in note for note in notes)
    indices = [tuple(f.FrameContentSequence[0].DimensionIndexValues) for f in seg.PerFrameFunctionalGroupsSequence]
    assert indices == sorted(set(indices)) and {place for _, place in indices} == set(
        range(1, len({p for _, p in indices}) + 1)
    )


def test_the_note_counts_every_voxel_of_an_overlap_once(tmp_path: Path) -> None:
    """The third mask overlaps the first alone, and lies in the layer of the second."""
    folder = write(tmp_path / "ct", series(along_z(REGULAR), FrameOfReferenceUID=FRAME_OF_REFERENCE))
    masks = {name: np.zeros(read_volume(folder).shape) for name in ("liver", "spleen", "stomach")}
    masks["liver"][2:8, 2:8, 2:6] = masks["spleen"][2:4, 2:8, 2:6] = masks["stomach"][6:8, 2:8, 2:4] = 1
    _, notes = wrote(folder, tmp_path, **masks)
    assert f"{2 * 6 * 4 + 2 * 6 * 2} voxels lie in more than one mask" in notes[0]


def test_one_map_of_overlapping_structures_if_asked(tmp_path: Path) -> None:
    folder = write(tmp_path / "ct", series(along_z(REGULAR), FrameOfReferenceUID=FRAME_OF_REFERENCE))
    bodies, volume = overlapping(folder), read_volume(folder)
    path, masks = tmp_path / "seg.dcm", mask_set(volume, folder, **bodies)
    build_writer("dicom_seg").write(path, masks, multilabel=True)
    flat, _ = masks.label_map()
    source = source_places(folder)
    found = masks_of_seg(path, source)
    ids = {entry["name"]: entry["id"] for entry in masks.labels}
    for name in bodies:
        assert sum(int(mask.sum()) for mask in found[name].values()) == int((flat == ids[name]).sum())
    assert pydicom.dcmread(path).SegmentationType == "LABELMAP"


def test_codes_colours_and_the_algorithm(tmp_path: Path) -> None:
    folder = write(tmp_path / "ct", series(along_z(REGULAR), FrameOfReferenceUID=FRAME_OF_REFERENCE))
    volume = read_volume(folder)
    empty = np.zeros(volume.shape)
    names = ("kidney_left", "liver_tumor", "mandible", "a free text", "vertebrae_L5")
    path, _ = wrote(folder, tmp_path, **dict.fromkeys(names, empty))
    seg = pydicom.dcmread(path)
    kidney, tumour, mandible, free, vertebra = (item for item in seg.SegmentSequence if item.SegmentNumber)

    def code(sequence: Any) -> tuple[str, str]:
        return sequence[0].CodeValue, sequence[0].CodingSchemeDesignator

    kind = kidney.SegmentedPropertyTypeCodeSequence
    assert code(kind) == ("64033007", "SCT") and kind[0].CodeMeaning == "Kidney"
    assert code(kind[0].SegmentedPropertyTypeModifierCodeSequence) == ("7771000", "SCT")
    assert vertebra.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Vertebrae L5"
    assert code(kidney.SegmentedPropertyCategoryCodeSequence) == ("123037004", "SCT")
    assert code(tumour.SegmentedPropertyCategoryCodeSequence) == ("49755003", "SCT")
    assert code(mandible.SegmentedPropertyTypeCodeSequence)[1] == "99MOME" and "private" in mandible.SegmentDescription
    assert free.SegmentLabel == "a free text" and "free text" in free.SegmentDescription
    assert [item.CodingSchemeDesignator for item in seg.CodingSchemeIdentificationSequence] == ["99MOME"]
    algorithm = kidney.SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmName == "mome mome-ct-tiny" and "0123456789abcdef" in algorithm.AlgorithmVersion
    lightness = [item.RecommendedDisplayCIELabValue[0] for item in (kidney, tumour, mandible, free)]
    assert lightness[3] == 65535 and len(set(lightness)) == 4
    assert str(seg.PatientName) == "Doe^Jane" and "InstitutionName" not in seg
    again, _ = wrote(folder, tmp_path / "again", **dict.fromkeys(names, empty))
    assert pydicom.dcmread(again).SOPInstanceUID != seg.SOPInstanceUID


def test_sources_without_identity_dates_or_thickness(tmp_path: Path) -> None:
    gone = dict.fromkeys(("PatientName", "PatientID", "PatientBirthDate", "SliceThickness", "SeriesDescription"))
    folder = write(
        tmp_path / "ct",
        series(along_z(REGULAR), FrameOfReferenceUID=FRAME_OF_REFERENCE, PatientSex="X", StudyDate="unknown", **gone),
    )
    path, _ = wrote(folder, tmp_path)
    seg = pydicom.dcmread(path)
    assert (seg.PatientName, seg.PatientID, seg.PatientSex, seg.StudyDate) == ("", "", "", "")
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness == 3


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("mome.volumes.writers.dicom_seg", "mome.volumes.dicom_out.segmentation"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(InputError, match=r"'dicom_seg' needs highdicom.*\n.*pip install 'mome\[dicom\]'"):
        build_writer("dicom_seg")


def test_names_in_other_letters(tmp_path: Path) -> None:
    identity = {"PatientName": "Größe^Åsa", "SpecificCharacterSet": "ISO_IR 100", "StudyDescription": "Kopf, früh"}
    folder = write(tmp_path / "ct", series(along_z(REGULAR), FrameOfReferenceUID=FRAME_OF_REFERENCE, **identity))
    path, _ = wrote(folder, tmp_path, **{"脾臓": np.zeros(read_volume(folder).shape)})
    seg = pydicom.dcmread(path)
    assert str(seg.PatientName) == "Größe^Åsa" and seg.StudyDescription == "Kopf, früh"
    assert seg.SegmentSequence[1].SegmentLabel == "脾臓"


def test_what_cannot_be_referred_to_is_refused(tmp_path: Path) -> None:
    writer = build_writer("dicom_seg")
    for source in (None, tmp_path / "ct.nii.gz", tmp_path / "ct.mha"):
        with pytest.raises(InputError, match="refers to the slices of a DICOM series, and this scan is none"):
            writer.check_source(source)
    writer.check_source(tmp_path)
    array = Volume(np.zeros((4, 4, 4), np.float32), np.eye(4))
    with pytest.raises(InputError, match="this scan is none"):
        writer.write(tmp_path / "a_seg.dcm", mask_set(array, None, liver=np.ones((4, 4, 4))))
    nowhere = write(tmp_path / "nowhere", series(along_z(REGULAR)))
    with pytest.raises(InputError, match="no FrameOfReferenceUID"):
        wrote(nowhere, tmp_path)
    with pytest.raises(InputError, match="no FrameOfReferenceUID"):  # before the network runs
        writer.check_source(nowhere)
    write(nowhere, series(along_z(REGULAR + 900), FrameOfReferenceUID=FRAME_OF_REFERENCE, SeriesInstanceUID="1.9"))
    writer.check_source(nowhere)  # another series has one; which is read is decided later
    with pytest.raises(InputError, match="no FrameOfReferenceUID"):
        writer.check_volume(read_volume(nowhere, dicom=DicomOptions(series="1.2.3.4")))
    writer.check_volume(read_volume(nowhere, dicom=DicomOptions(series="1.9")))
    with pytest.raises(InputError, match="this scan is none"):
        writer.check_volume(array)
    twins = write(
        tmp_path / "twins", series(along_z(REGULAR), FrameOfReferenceUID=FRAME_OF_REFERENCE, SOPInstanceUID="1.2.7")
    )
    with pytest.raises(InputError, match="have no SOPInstanceUID, or share one"):
        wrote(twins, tmp_path)
    with pytest.raises(InputError, match="have no SOPInstanceUID, or share one"):
        writer.check_volume(read_volume(twins))
    assert not list(tmp_path.glob("*seg.dcm"))
    with pytest.raises(InputError, match="'kind' is one of auto, binary, got 'binery', did you mean 'binary'"):
        build_writer("dicom_seg(kind=binery)")


def test_highdicom_reads_a_tilted_series_by_its_slices(tmp_path: Path) -> None:
    import highdicom

    positions = along_z(IRREGULAR["step doubles"])
    folder = write(tmp_path / "ct", series(positions, tilted(20), FrameOfReferenceUID=FRAME_OF_REFERENCE))
    body = ball(middle(read_volume(folder)), (5, 6, 9))
    path, _ = wrote(folder, tmp_path, liver=body)
    source = source_places(folder)
    read = highdicom.seg.segread(path).get_pixels_by_source_instance(
        [uid for uid, _ in source], ignore_spatial_locations=False, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(read[..., 0] > 0, [body(places) for places in source.values()])


@pytest.mark.parametrize("spec", ["dicom_seg", "dicom_seg(kind=binary)"])
@pytest.mark.parametrize("name", ["plain", "reversed", "sagittal", "oblique", "feet first"])
def test_dcmqi_reads_the_same_masks(tmp_path: Path, name: str, spec: str) -> None:
    """dcmqi, on ITK and DCMTK, shares no code with highdicom and pydicom. ITK images hold no tilt of a gantry."""
    orientation, positions = REGULAR_SERIES[name]
    folder = write(tmp_path / "ct", series(positions, orientation, FrameOfReferenceUID=FRAME_OF_REFERENCE))
    volume = read_volume(folder)
    bodies = overlapping(folder)
    if spec == "dicom_seg":
        bodies = {name: bodies[name] for name in ("liver", "kidney_left")}
    bodies.pop("spleen", None)  # dcmqi writes no file for a structure without a voxel
    path, _ = wrote(folder, tmp_path, spec, **bodies)
    masks = mask_set(volume, folder, **bodies).masks
    read = read_by_dcmqi(path, tmp_path / "out")
    for number, name in enumerate(bodies, 1):
        wanted = np.argwhere(masks[name]) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
        assert {tuple(p) for p in np.round(read[number], 1) + 0.0} == {tuple(p) for p in np.round(wanted, 1) + 0.0}


def read_by_dcmqi(path: Path, out: Path) -> dict[int, np.ndarray]:
    """Segment number → (voxels, 3) RAS mm of its voxels, as dcmqi writes them to NIfTI."""
    tool = shutil.which(
        "segimage2itkimage", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if tool is None:
        pytest.skip("pip install dcmqi")
    out.mkdir()
    command = [tool, "--inputDICOM", str(path), "--outputDirectory", str(out), "--outputType", "nii"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = {}
    for file in out.glob("*.nii.gz"):
        image = nib.load(file)
        array = np.asarray(image.dataobj)
        for number in np.unique(array[array > 0]):  # one file for a label map, one per segment for bits
            at = np.argwhere(array == number) @ image.affine[:3, :3].T + image.affine[:3, 3]
            found[int(number)] = at
    return found
