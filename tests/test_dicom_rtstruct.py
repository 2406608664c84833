"""RT Structure Sets: their contours, rasterised by other code, give the masks back, for every kind of series."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_readback import ball, dice_in_world, mask_set, masks_of_structure_set, source_places
from dicom_series import AXIAL, along_z, enhanced, series, tilted, write
from matplotlib.path import Path as Outline
from skimage.draw import polygon2mask
from test_dicom_geometry import IRREGULAR, REGULAR, REGULAR_SERIES
from test_dicom_seg import FRAME_OF_REFERENCE, middle, overlapping

from mome.errors import InputError
from mome.volumes import Volume, read_volume
from mome.volumes.dicom_out.contours import plane_contours
from mome.volumes.writers.base import build_writer, one_file_per_structure


def rasterised(mask: np.ndarray) -> list[np.ndarray]:
    """The mask by two codes that fill polygons, and by two ways to combine the polygons."""
    j, i = np.mgrid[: mask.shape[0], : mask.shape[1]]
    centres, polygons = np.stack([j.ravel(), i.ravel()], axis=1), plane_contours(mask)
    filled = [polygon2mask(mask.shape, polygon) for polygon in polygons]
    by_outline = [Outline(np.vstack([p, p[:1]])).contains_points(centres).reshape(mask.shape) for p in polygons]
    nothing = np.zeros(mask.shape, bool)
    return [
        np.any([nothing, *filled], axis=0),
        np.logical_xor.reduce([nothing, *filled]),
        np.any([nothing, *by_outline], axis=0),
    ]


def drawn(text: str) -> np.ndarray:
    return np.array([[letter == "#" for letter in row] for row in text.split()])


SHAPES = {
    "nothing": "... ...",
    "one pixel": "... .#. ...",
    "a corner": "#.. ... ..#",
    "everything": "### ###",
    "touching corners": "#.# .#. #.#",
    "ring": "##### #...# #...# #####",
    "ring in a ring": "####### #.....# #.###.# #.#.#.# #.###.# #.....# #######",
    "holes in a row": "######### #.#.#.#.# ######### ##.###..# #########",
    "holes that touch": "##### #.### ##.## #...# #####",
    "a hole and a bay": "##### #...# #.#.. #...# #####",
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_come_back(name: str) -> None:
    mask = drawn(SHAPES[name])
    for found in rasterised(mask):
        np.testing.assert_array_equal(found, mask)


def test_random_masks_come_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        mask = rng.random((rng.integers(1, 16), rng.integers(1, 16))) < rng.random()
        for found in rasterised(mask):
            np.testing.assert_array_equal(found, mask)


def test_straight_sides_have_two_points_and_many_holes_need_no_recursion() -> None:
    square = np.zeros((40, 30), bool)
    square[5:35, 4:20] = True
    (polygon,) = plane_contours(square)
    assert len(polygon) == 8  # corners are cut
    sieve = np.ones((3, 5001), bool)
    sieve[1, 1::2] = False
    assert len(plane_contours(sieve)) == 1
    assert sum(map(len, rasterised(sieve[:, :101])[0])) == 3 * 101


def wrote(folder: Path, out: Path, **bodies: Any) -> tuple[Path, list[str]]:
    path = out / "ct_rtstruct.dcm"
    notes = build_writer("rtstruct").write(path, mask_set(read_volume(folder), folder, **bodies))
    return path, list(notes or ())


@pytest.mark.parametrize("name", REGULAR_SERIES)
def test_regular_series(tmp_path: Path, name: str) -> None:
    orientation, positions = REGULAR_SERIES[name]
    folder = write(tmp_path / "ct", series(positions, orientation, FrameOfReferenceUID=FRAME_OF_REFERENCE))
    volume = read_volume(folder)
    body = ball(middle(volume), (4, 5, 6))
    hole = ball(middle(volume), (2, 2.6, 4))

    def hollow(at: np.ndarray) -> np.ndarray:
        return body(at) & ~hole(at)

    path, notes = wrote(folder, tmp_path, liver=body, spleen=hollow, all=lambda at: at[..., 0] < 1e4)
    source = source_places(folder)
    found = masks_of_structure_set(path, source)
    least = 0.99 if name.startswith("rounded") else 1  # planes lie up to 0.05 mm beside the slices
    assert dice_in_world(found["liver"], source, body) >= least and notes == []
    assert dice_in_world(found["spleen"], source, hollow) >= least
    assert all(mask.all() for mask in found["all"].values()) and len(found["all"]) == len(positions)


@pytest.mark.parametrize("name", IRREGULAR)
@pytest.mark.parametrize("orientation", [AXIAL, tilted(12)], ids=["straight", "tilted"])
def test_irregular_series_get_the_masks_at_their_slices(tmp_path: Path, name: str, orientation: Any) -> None:
    slices = series(along_z(IRREGULAR[name]), orientation, FrameOfReferenceUID=FRAME_OF_REFERENCE)
    folder = write(tmp_path / "ct", slices)
    body = ball(middle(read_volume(folder)), (5, 6, 9))
    path, notes = wrote(folder, tmp_path, liver=body)
    source = source_places(folder)
    dice = dice_in_world(masks_of_structure_set(path, source)["liver"], source, body)
    assert dice > 0.9 if name == "odd steps" else dice == 1
    assert "at irregular steps" in notes[0]


@pytest.mark.parametrize("writer", ["rtstruct", "dicom_seg"])
def test_a_structure_between_the_slices_is_said_to_be_lost(tmp_path: Path, writer: str) -> None:
    """The planes of an irregular series lie between its slices, too; a structure set lost what was there in silence."""
    slices = series(along_z([0, 3, 6, 9, 12, 14, 17, 20]), FrameOfReferenceUID=FRAME_OF_REFERENCE)
    folder = write(tmp_path / "ct", slices)
    volume = read_volume(folder)
    between, on_slice = np.zeros(volume.shape), np.zeros(volume.shape)
    assert volume.spacing[2] == pytest.approx(1)
    between[3:6, 3:6, 1] = on_slice[3:6, 3:6, 3] = 1
    bodies = {"liver": on_slice, "spleen": between, "aorta": np.zeros(volume.shape)}
    notes = build_writer(writer).write(tmp_path / "out.dcm", mask_set(volume, folder, **bodies))
    assert [note for note in notes or () if note.endswith("holds nothing of: spleen")] == list(notes or ())[1:]
    assert len(notes or ()) == 2


def test_enhanced_ct(tmp_path: Path) -> None:
    image = enhanced(along_z(REGULAR), tilted(10), [3, 0, 8, 1, 2, 7, 4, 6, 5], FrameOfReferenceUID=FRAME_OF_REFERENCE)
    folder = write(tmp_path / "ct", [image])
    body = ball(middle(read_volume(folder)), (4, 5, 6))
    path, _ = wrote(folder, tmp_path, liver=body)
    source = source_places(folder)
    assert dice_in_world(masks_of_structure_set(path, source)["liver"], source, body) == 1


def test_single_voxels_and_overlaps(tmp_path: Path) -> None:
    folder = write(tmp_path / "ct", series(along_z(REGULAR), tilted(15), FrameOfReferenceUID=FRAME_OF_REFERENCE))
    volume, rng = read_volume(folder), np.random.default_rng(0)
    single, noise = np.zeros(volume.shape), rng.random(volume.shape) < 0.4
    single[3, 7, 2] = 1
    bodies = {**overlapping(folder), "single": single, "noise": noise}
    path, _ = wrote(folder, tmp_path, **bodies)
    source = source_places(folder)
    found = masks_of_structure_set(path, source)
    masks = mask_set(volume, folder, **bodies).masks
    assert list(found) == list(bodies) and found["spleen"] == {}
    heights = sorted(source, key=lambda key: source[key][0, 0, 2])
    for name, mask in masks.items():
        for plane, key in enumerate(heights):
            slice_mask = found[name].get(key, np.zeros(mask.shape[1::-1], bool))
            np.testing.assert_array_equal(slice_mask, mask[:, :, plane].T)


def test_what_the_file_says(tmp_path: Path) -> None:
    identity = {"PatientName": "Größe^Åsa", "SpecificCharacterSet": "ISO_IR 100", "PatientSex": "F"}
    folder = write(tmp_path / "ct", series(along_z(REGULAR), FrameOfReferenceUID=FRAME_OF_REFERENCE, **identity))
    empty = np.zeros(read_volume(folder).shape)
    path, _ = wrote(folder, tmp_path, kidney_right=empty, **{"脾臓": empty})
    read = pydicom.dcmread(path)
    assert read.SOPClassUID == "1.2.840.10008.5.1.4.1.1.481.3" and read.Modality == "RTSTRUCT"
    assert str(read.PatientName) == "Größe^Åsa" and read.PatientSex == "F" and read.StudyInstanceUID == "1.2.3"
    assert [item.ROIName for item in read.StructureSetROISequence] == ["kidney_right", "脾臓"]
    assert read.ROIContourSequence[0].ROIDisplayColor == [190, 95, 50]
    code = read.RTROIObservationsSequence[0].RTROIIdentificationCodeSequence[0]
    assert code.CodeValue == "64033007"
    assert code.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Right"
    frame = read.ReferencedFrameOfReferenceSequence[0]
    assert frame.FrameOfReferenceUID == read.StructureSetROISequence[0].ReferencedFrameOfReferenceUID == "1.2.826.9"
    listed = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert listed.SeriesInstanceUID == "1.2.3.4"
    uids = {str(pydicom.dcmread(file).SOPInstanceUID) for file in folder.iterdir()}
    assert {item.ReferencedSOPInstanceUID for item in listed.ContourImageSequence} == uids


def test_only_dicom_and_no_map_of_ids(tmp_path: Path) -> None:
    writer = build_writer("rtstruct")
    with pytest.raises(InputError, match="an RT Structure Set refers to the slices of a DICOM series"):
        writer.check_source(tmp_path / "ct.nii.gz")
    with pytest.raises(InputError, match="this scan is none"):
        volume = Volume(np.zeros((4, 4, 4), np.float32), np.eye(4))
        writer.write(tmp_path / "a.dcm", mask_set(volume, None, liver=np.ones((4, 4, 4))))
    with pytest.raises(InputError, match="writes no map of ids"):
        one_file_per_structure(writer, multilabel=True)
    assert list(tmp_path.iterdir()) == []
