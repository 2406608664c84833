"""Files whose header says that they are no CT are refused as scans, in every format, and still read as label maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_scans import SHAPE, nrrd_text, patient_hu, save_mha, save_nrrd, save_patient

from mome.errors import InputError
from mome.volumes import read_label_map, read_volume

INTENTS = {
    3: "statistic", 22: "statistic", 1001: "estimate", 1002: "label map", 1003: "labels", 1005: "matrices",
    1006: "displacement field", 1007: "vectors", 1011: "quaternions", 2001: "time series", 2004: "colour",
    2005: "shape",
}  # fmt: skip


@pytest.mark.parametrize("code", INTENTS)
def test_nifti_intents_of_other_images_are_refused(code: int, tmp_path: Path) -> None:
    path = save_patient(tmp_path / "ct.nii.gz", intent_code=code)
    with pytest.raises(InputError, match=f"not a CT but .*{INTENTS[code]}") as caught:
        read_volume(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 3
    assert any("not a CT" in note for note in read_volume(path, any_values=True).notes)  # `mome info` shows such files


def test_label_maps_with_the_intent_of_labels_are_read(tmp_path: Path) -> None:
    labels = (patient_hu() > 300).astype(np.uint8)
    path = save_patient(tmp_path / "labels.nii.gz", labels, intent_code=1002)
    np.testing.assert_array_equal(read_label_map(path).array, labels)


def test_other_words_of_nifti_are_notes_or_nothing(tmp_path: Path) -> None:
    for fields, note in (
        ({"intent_code": 1010}, None),
        ({"intent_name": b"HU"}, None),
        ({"descrip": b"T1w MR", "db_name": b"MR"}, None),
        ({"intent_name": b"probability"}, "intent_name is 'probability'"),
        ({"intent_code": 5000}, "unknown 5000"),
        ({"intent_code": -7}, "unknown -7"),
    ):
        notes = read_volume(save_patient(tmp_path / "ct.nii", **fields)).notes
        assert [note in said for said in notes] == ([True] if note else []), (fields, notes)


@pytest.mark.parametrize("modality", ["MET_MOD_MR", "MET_MOD_NM", "MET_MOD_US", "MR"])
def test_modalities_of_metaimage_and_nrrd(modality: str, tmp_path: Path) -> None:
    word = modality.removeprefix("MET_MOD_")
    with pytest.raises(InputError, match=f"not a CT but {word}"):
        read_volume(save_mha(tmp_path / "ct.mha", Modality=modality))
    text = nrrd_text() + f"modality:={modality}\n\n"
    (tmp_path / "ct.nrrd").write_bytes(text.encode() + patient_hu().tobytes(order="F"))
    with pytest.raises(InputError, match=f"not a CT but {word}"):
        read_volume(tmp_path / "ct.nrrd")
    read_label_map(save_mha(tmp_path / "labels.mha", Modality=modality))


@pytest.mark.parametrize("modality", ["MET_MOD_CT", "MET_MOD_OTHER", "MET_MOD_UNKNOWN", "CT", ""])
def test_ct_and_unknown_modalities_are_read(modality: str, tmp_path: Path) -> None:
    assert read_volume(save_mha(tmp_path / "ct.mha", Modality=modality)).notes == ()


def test_objects_of_metaio_that_are_no_image(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="object of type Tube"):
        read_volume(save_mha(tmp_path / "ct.mha", ObjectType="Tube"))


@pytest.mark.parametrize(
    ("key", "words"),
    [("DWMRI_b-value:=1000", "diffusion MR"), ("Segment0_ID:=Segment_1", "segmentation"), ("modality:=DWMRI", "DWMRI")],
)
def test_keys_of_nrrd_that_say_what_it_is(key: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "ct.nrrd").write_bytes((nrrd_text() + key + "\n\n").encode() + patient_hu().tobytes(order="F"))
    with pytest.raises(InputError, match=f"not a CT but .*{words}"):
        read_volume(tmp_path / "ct.nrrd")


@pytest.mark.parametrize("kind", ["vector", "covariant-vector", "3D-symmetric-matrix", "3-vector"])
def test_axes_of_components_are_no_frames(kind: str, tmp_path: Path) -> None:
    step = nrrd_text().split("space directions: ")[1].splitlines()[0]
    several = np.stack([patient_hu()] * 3)
    path = save_nrrd(
        tmp_path / "ct.nrrd", several, dimension="4", sizes=f"3 {' '.join(map(str, SHAPE))}",
        kinds=f"{kind} domain domain domain", space_directions=f"none {step}",
    )  # fmt: skip
    with pytest.raises(InputError, match="several components per voxel"):
        read_volume(path, frame=0)


def test_fields_of_nrrd_about_values_are_noted(tmp_path: Path) -> None:
    notes = read_volume(save_nrrd(tmp_path / "a.nrrd", old_min="0", old_max="100")).notes
    assert len(notes) == 1 and "values from 0 to 100" in notes[0]
    notes = read_volume(save_nrrd(tmp_path / "b.nrrd", sample_units='"1/cm"')).notes
    assert len(notes) == 1 and "'sample units' are '1/cm'" in notes[0]
    assert read_volume(save_nrrd(tmp_path / "c.nrrd", sample_units='"HU"')).notes == ()


def test_a_mask_of_several_volumes_says_how_to_make_one(tmp_path: Path) -> None:
    import nibabel as nib

    masks = np.stack([patient_hu() > 0, patient_hu() > 300], -1).astype(np.uint8)
    path = tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image(masks, np.eye(4) * 8), path)
    with pytest.raises(InputError, match=r"2 volumes, and a label map is one") as caught:
        read_label_map(path)
    assert "--frame" not in str(caught.value) and "slicer[..., 0]" in str(caught.value)
    nib.save(nib.load(path).slicer[..., 0], tmp_path / "one.nii.gz")  # what the hint says
    np.testing.assert_array_equal(read_label_map(tmp_path / "one.nii.gz").array, masks[..., 0])
