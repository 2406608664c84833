"""Label maps are whole numbers everywhere: one function reads them for evaluation, training and caches."""

from __future__ import annotations

import json
import logging
import unicodedata
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from small_scans import SHAPE, mha_text, nrrd_text, patient_affine, patient_hu, patient_image

from mome.data.cache_build import cache_case_folder
from mome.data.case_folder import CaseFolder
from mome.errors import InputError
from mome.metrics import evaluate_folder
from mome.processing import MoMEProcessor
from mome.volumes import read_label_map
from mome.volumes.case_list import read_case_list
from mome.volumes.label_map import unnamed_values


def labels() -> np.ndarray:
    """A map of OpenKBP's mandible (6) and larynx (7)."""
    array = np.zeros(SHAPE, np.uint8)
    array[4:9, 5:9, 3:8] = 6
    array[12:16, 5:9, 3:8] = 7
    return array


def save_map(path: Path, array: np.ndarray, slope: float | None = None, intercept: float = 0.0) -> Path:
    """Writes a label map; with a slope, its values are stored as uint16 with that slope, as nibabel does it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if slope is None:
        nib.save(patient_image(array), path)
        return path
    stored = np.round((array - intercept) / slope).astype(np.uint16)
    data = bytearray(patient_image(stored).to_bytes())
    header = np.frombuffer(bytes(data[:348]), nib.nifti1.header_dtype).copy()
    header["scl_slope"], header["scl_inter"] = slope, intercept
    data[:348] = header.tobytes()
    path.write_bytes(data)
    return path


def test_values_near_whole_numbers_are_rounded(tmp_path: Path) -> None:
    expected = labels()
    for number, (slope, intercept) in enumerate(((7 / 65535, 0), (1e-3, 0), (0.0014, -3.0), (1.0, -5.0))):
        path = save_map(tmp_path / f"{number}.nii", expected, slope, intercept)
        volume = read_label_map(path)
        assert volume.array.dtype == np.uint8
        np.testing.assert_array_equal(volume.array, expected)
    for kind in (np.float32, np.float64, np.int16, np.uint16, np.int32):
        np.testing.assert_array_equal(
            read_label_map(save_map(tmp_path / "k.nii.gz", expected.astype(kind))).array, expected
        )
    moved = expected + np.float32(9e-4)
    np.testing.assert_array_equal(read_label_map(save_map(tmp_path / "m.nii", moved)).array, expected)


@pytest.mark.parametrize("value", [0.5, 5.002, 5.998, -0.25, np.nan, np.inf, 1e12])
def test_values_that_are_no_whole_numbers_are_refused(value: float, tmp_path: Path) -> None:
    array = labels().astype(np.float64)
    array[2, 3, 4] = value
    path = save_map(tmp_path / "m.nii.gz", array)
    with pytest.raises(InputError, match="a label map holds") as caught:
        read_label_map(path)
    assert str(path) in str(caught.value)
    assert value == 1e12 or "at voxel (2, 3, 4)" in str(caught.value)


def test_labels_keep_large_and_negative_values(tmp_path: Path) -> None:
    for value, kind in ((200, np.uint8), (60_000, np.uint16), (-1, np.int32), (70_000, np.int32)):
        array = labels().astype(np.int32)
        array[0, 0, 0] = value
        found = read_label_map(save_map(tmp_path / "m.nii.gz", array)).array
        assert found.dtype == kind and found[0, 0, 0] == value
        assert unnamed_values(found, [6, 7]) == [value]


def test_maps_in_other_formats_are_read(tmp_path: Path) -> None:
    voxels = labels().tobytes(order="F")
    (tmp_path / "m.mha").write_bytes(mha_text(ElementType="MET_UCHAR").encode() + voxels)
    (tmp_path / "m.nrrd").write_bytes(nrrd_text(type="uchar").encode() + b"\n" + voxels)
    for name in ("m.mha", "m.nrrd"):
        np.testing.assert_array_equal(read_label_map(tmp_path / name).array, labels())


# -- evaluation ----------------------------------------------------------------------------------------------


def test_the_identical_map_scores_1_however_it_is_stored(tmp_path: Path) -> None:
    save_map(tmp_path / "r" / "c.nii.gz", labels())
    save_map(tmp_path / "p" / "c.nii", labels(), 7 / 65535)
    scores = evaluate_folder(tmp_path / "p", tmp_path / "r", dataset="openkbp", structures=["mandible", "larynx"])
    assert [score.dice for score in scores] == [1.0, 1.0]


def test_values_without_a_name_are_said(tmp_path: Path, caplog) -> None:
    odd = labels()
    odd[0, 0, :3] = (200, 201, 202)
    for side in "pr":
        save_map(tmp_path / side / "c.nii.gz", odd)
    with caplog.at_level(logging.WARNING):
        evaluate_folder(tmp_path / "p", tmp_path / "r", dataset="openkbp", structures=["larynx"])
    assert caplog.text.count("no structure has the value 200, 201, 202") == 2
    (tmp_path / "cases.json").write_text('{"c": {"annotated": ["larynx", "brainstem"]}}')
    with caplog.at_level(logging.WARNING):
        evaluate_folder(tmp_path / "p", tmp_path / "r", dataset="openkbp", cases=tmp_path / "cases.json")
    assert "'brainstem' is annotated, and its reference has no voxel" in caplog.text


def moved(change: str) -> np.ndarray:
    affine = patient_affine()
    if change == "origin":
        affine[:3, 3] += (0, 12, 0)
    elif change == "directions":
        angle = np.radians(5)
        affine[:3] = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]] @ affine[:3]
    elif change == "axes":
        affine[:3, :2] *= -1
    else:
        affine[:3, :3] *= 1.01
    return affine


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("origin", "12 mm apart"),
        ("directions", "directions 5° apart"),
        ("axes", "axes run to LPS and RAS"),
        ("spacing", "spacing 8.08×9.09×10.1 and 8×9×10 mm"),
        ("shape", "shape 24×22×19 and 24×22×20"),
    ],
)
def test_different_grids_say_what_differs(change: str, words: str, tmp_path: Path) -> None:
    array = labels()[:, :, :-1] if change == "shape" else labels()
    (tmp_path / "p").mkdir()
    nib.save(patient_image(array, None if change == "shape" else moved(change)), tmp_path / "p" / "c.nii.gz")
    save_map(tmp_path / "r" / "c.nii.gz", labels())
    with pytest.raises(InputError, match="different grids") as caught:
        evaluate_folder(tmp_path / "p", tmp_path / "r", dataset="openkbp", structures=["larynx"])
    assert words in str(caught.value) and ("shape" in str(caught.value)) == (change == "shape")


def test_masks_of_scans_with_spaces_pair_with_their_reference(tmp_path: Path) -> None:
    from mome.volumes.mask_names import file_part, mask_paths

    for scan in ("patient 1", "Müller, (a)", "Mu\u0308ller b", "n" * 120, "CT"):
        for name, number in (("mandible", 6), ("odd lesion", 7)):
            (path,) = mask_paths(tmp_path / "p", file_part(scan), [name])
            save_map(path, (labels() == number).astype(np.uint8))
        save_map(tmp_path / "r" / f"{scan}.NII.GZ", labels())
        found = evaluate_folder(tmp_path / "p", tmp_path / "r", dataset="openkbp", structures=["mandible"])
        composed = unicodedata.normalize("NFC", scan)  # names of cases are the same on every system
        assert [(score.case, score.dice) for score in found] == [(composed, 1.0)]
        for folder in "pr":
            for path in (tmp_path / folder).iterdir():
                path.unlink()


@pytest.mark.parametrize(("low", "high"), [(-1, 0), (0, 0.4), (-1, 1)])
def test_masks_of_other_values_than_0_and_one_number_are_refused(low: float, high: float, tmp_path: Path) -> None:
    for side in "pr":
        save_map(tmp_path / side / "c_larynx.nii.gz", np.where(labels() == 7, high, low).astype(np.float32))
    with pytest.raises(InputError, match="c_larynx.nii.gz"):
        evaluate_folder(tmp_path / "p", tmp_path / "r")


def test_a_mask_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    for name in ("c_larynx.nii.gz", "c_larynx.nii"):
        save_map(tmp_path / "p" / name, (labels() == 7).astype(np.uint8))
    save_map(tmp_path / "r" / "c_larynx.nii.gz", (labels() == 7).astype(np.uint8))
    with pytest.raises(InputError, match="more than one mask of 'larynx'"):
        evaluate_folder(tmp_path / "p", tmp_path / "r")


# -- training ------------------------------------------------------------------------------------------------


def cases(folder: Path, array: np.ndarray, annotated: object = ("mandible", "larynx"), **save: float) -> CaseFolder:
    (folder / "images").mkdir(parents=True)
    nib.save(patient_image(), folder / "images" / "c.nii.gz")
    save_map(folder / "labels" / "c.nii.gz", array, **save)
    (folder / "cases.json").write_text(json.dumps({"c": {"annotated": annotated}}))
    return CaseFolder(folder, "openkbp")


def cached(tmp_path: Path, folder: CaseFolder):
    processor = MoMEProcessor(spacing=[8, 9, 10])
    return cache_case_folder(tmp_path / "cache", folder, "test", ["mandible", "larynx"], processor)[0]


def test_training_learns_a_map_that_was_stored_with_a_slope(tmp_path: Path) -> None:
    plain = cached(tmp_path, cases(tmp_path / "a", labels()))
    scaled = cached(tmp_path, cases(tmp_path / "b", labels(), slope=7 / 65535))
    np.testing.assert_array_equal(plain.labels, scaled.labels)
    assert (np.asarray(plain.labels) > 0).sum() == (labels() > 0).sum()


@pytest.mark.parametrize("value", [200, -1, 0.5, np.nan])
def test_maps_of_wrong_values_are_refused_by_name(value: float, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="labels/c.nii.gz"):
        cached(tmp_path, cases(tmp_path / "a", np.full(SHAPE, value, np.float32)))
    assert not list(tmp_path.glob("cache/*"))


def test_odd_values_and_empty_structures_are_said(tmp_path: Path) -> None:
    odd = np.where(labels() == 7, 0, labels())
    odd[0, 0, 0] = 99
    processor = MoMEProcessor(spacing=[8, 9, 10])
    folder = cases(tmp_path / "a", odd)
    notes = " ".join(cache_case_folder(tmp_path / "cache", folder, "test", ["mandible", "larynx"], processor).notes)
    assert "does not name the label values 99" in notes and "without a voxel: larynx" in notes


def test_a_case_on_another_grid_says_what_differs(tmp_path: Path) -> None:
    folder = cases(tmp_path / "a", labels())
    nib.save(patient_image(labels(), moved("origin")), tmp_path / "a" / "labels" / "c.nii.gz")
    with pytest.raises(InputError, match="12 mm apart"):
        cached(tmp_path, folder)


def test_training_reads_the_formats_that_segment_reads(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    cases(folder, labels())
    (folder / "images" / "c.nii.gz").rename(folder / "images" / "c.NII.GZ")
    (folder / "images" / "._c.nii.gz").write_bytes(b"attributes")
    (folder / "labels" / "c.nii.gz").unlink()
    voxels = labels().tobytes(order="F")
    (folder / "labels" / "c.MHA").write_bytes(mha_text(ElementType="MET_UCHAR").encode() + voxels)
    found = cached(tmp_path, CaseFolder(folder, "openkbp"))
    assert (np.asarray(found.labels) > 0).sum() == (labels() > 0).sum() and patient_hu().shape == found.volume.shape


# -- cases.json ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_every_encoding_of_the_list_of_cases_is_read(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "cases.json"
    path.write_bytes('{"Müller": {"annotated": ["larynx"]}}'.encode(encoding))
    assert read_case_list(path) == {"Müller": ("larynx",)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfa\x00", "not valid JSON"),
        ('{"é": 1}'.encode("latin-1"), "not valid JSON"),
        (b"[" * 100_000, "nests too deeply"),
        (b'{"c": ' + b"9" * 5000 + b"}", "list of cases is not"),
        (b"[]", "no object in braces"),
        (b"null", "no object in braces"),
        (b'{"c": []}', "case 'c'"),
        (b'{"c": {}}', "case 'c'"),
        (b'{"c": {"annotated": "mandible"}}', "in brackets"),
        (b'{"c": {"annotated": [6]}}', "in brackets"),
        (b'{"c": {"annotated": null}}', "in brackets"),
        (b'{"../c": {"annotated": ["larynx"]}}', "names are no paths"),
        (b'{"/etc/passwd": {"annotated": ["larynx"]}}', "names are no paths"),
        (b'{"": {"annotated": ["larynx"]}}', "names are no paths"),
        (b'{"c": {"annotated": ["larynx"]}, "c": {"annotated": []}}', "has 'c' twice"),
        (b"{}", "lists no case"),
        (b'{"c": {"annotated": ["larynx", "larynx"]}}', "lists a structure twice"),
    ],
)
def test_lists_of_cases_that_are_refused_in_words(content: bytes, words: str, tmp_path: Path) -> None:
    cases(tmp_path / "a", labels())
    (tmp_path / "a" / "cases.json").write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        CaseFolder(tmp_path / "a", "openkbp")
    assert "cases.json" in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_a_case_without_structures_is_said(tmp_path: Path, caplog) -> None:
    cases(tmp_path / "a", labels())
    for kind in ("images", "labels"):
        (tmp_path / "a" / kind / "d.nii.gz").write_bytes((tmp_path / "a" / kind / "c.nii.gz").read_bytes())
    (tmp_path / "a" / "cases.json").write_text('{"c": {"annotated": ["larynx"]}, "d": {"annotated": []}}')
    with caplog.at_level(logging.WARNING):
        CaseFolder(tmp_path / "a", "openkbp")
    assert "case 'd'" in caplog.text and "no annotated structure" in caplog.text
