"""Headers of NRRD, MetaImage and NIfTI that contradict themselves or leave something open, beside ITK and nibabel."""

from __future__ import annotations

import bz2
import gzip
import itertools
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from small_scans import SHAPE, mha_text, nrrd_text, patient_affine, patient_hu, save_mha, save_nrrd, save_patient

from mome.errors import InputError
from mome.volumes import Grid, Volume, checked_volume, network_grid, read_volume
from mome.volumes.sizes import FARTHEST_MM, LARGEST_VOXEL_MM

NO_SPACE = {"space": None, "space_directions": None, "space_origin": None}


def itk_affine(path: Path) -> np.ndarray:
    """Returns the affine to RAS mm of a file as SimpleITK reads it."""
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def same_as_itk(path: Path, note: str | None) -> None:
    volume = read_volume(path)
    np.testing.assert_allclose(volume.affine, itk_affine(path), atol=1e-3)
    np.testing.assert_array_equal(volume.array, patient_hu())
    if note is None:
        assert volume.notes == ()
    else:
        assert any(note in said for said in volume.notes), volume.notes


MHA: dict[str, tuple[dict[str, str | None], str | None]] = {
    **{
        f"spacing {x} {y} {z}": ({"ElementSpacing": f"{x} {y} {z}"}, "ElementSpacing is negative")
        for x, y, z in itertools.product((8, -8), (9, -9), (10, -10))
        if min(x, y, z) < 0
    },
    "negative, oblique": (
        {"ElementSpacing": "8 -9 10", "TransformMatrix": "0.8 0.6 0 -0.6 0.8 0 0 0 1"},
        "ElementSpacing is negative",
    ),
    "matrix of other lengths": ({"TransformMatrix": "-2 0 0 0 -1 0 0 0 1"}, "rows of the header's TransformMatrix"),
    "sheared matrix": ({"TransformMatrix": "-1 0 0 0.3 -1 0 0 0 1"}, "not at right angles"),
    "ElementSize alone": ({"ElementSpacing": None, "ElementSize": "8 9 10"}, None),
    "Origin": ({"Offset": None, "Origin": "1 2 3"}, None),
    "no Offset": ({"Offset": None}, "has no 'Offset'"),
    "Offset and Position alike": ({"Position": "90 95 -60"}, None),
    "orientation from": ({"AnatomicalOrientation": "LPI"}, None),
    "orientation to": ({"AnatomicalOrientation": "RAS"}, None),
    "orientation unknown": ({"AnatomicalOrientation": "???"}, None),
    "orientation contradicts": ({"AnatomicalOrientation": "RPS"}, "AnatomicalOrientation 'RPS' contradicts"),
    "orientation without a matrix": ({"TransformMatrix": None, "AnatomicalOrientation": "LPI"}, "contradicts"),
    "HeaderSize -1": ({"HeaderSize": "-1"}, None),
}


@pytest.mark.parametrize("name", MHA)
def test_metaimage_lies_where_itk_has_it(name: str, tmp_path: Path) -> None:
    fields, note = MHA[name]
    same_as_itk(save_mha(tmp_path / "ct.mha", **fields), note)


def test_orientations_that_itk_writes_contradict_nothing(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(patient_hu().transpose(2, 1, 0))
    image.SetSpacing((8, 9, 10))
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            image.SetDirection((np.eye(3)[list(axes)] * signs).ravel().tolist())
            sitk.WriteImage(image, str(tmp_path / "ct.mha"))
            same_as_itk(tmp_path / "ct.mha", None)


def test_the_function_of_metaimage_is_said_to_be_applied(tmp_path: Path) -> None:
    path = save_mha(
        tmp_path / "ct.mha", (patient_hu() + 1024).astype(np.int16), ElementToIntensityFunctionOffset="-1024"
    )
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, patient_hu())
    assert len(volume.notes) == 1 and "is applied" in volume.notes[0] and "ITK" in volume.notes[0]


def test_units_of_distance_are_used(tmp_path: Path) -> None:
    fields = {"ElementSpacing": "0.8 0.9 1", "Offset": "9 9.5 -6"}
    volume = read_volume(save_mha(tmp_path / "ct.mha", **fields, DistanceUnits="cm"))
    np.testing.assert_allclose(volume.affine, patient_affine())
    assert any("unit is 'cm'" in note for note in volume.notes)
    with pytest.raises(InputError, match="'DistanceUnits' is mm, cm or um"):
        read_volume(save_mha(tmp_path / "ct.mha", DistanceUnits="feet"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"Position": "0 0 0"}, "Offset and Position are names of one field"),
        ({"Origin": "90 95 60"}, "Offset and Origin are names of one field"),
        ({"Rotation": "1 0 0 0 1 0 0 0 1"}, "TransformMatrix and Rotation are names of one field"),
        ({"ElementByteOrderMSB": "True"}, "contradict each other"),
        ({"BinaryDataByteOrderMSB": "maybe"}, "True or False"),
        ({"CompressedData": "zlib"}, "True or False"),
        ({"HeaderSize": "10"}, "data follow the header"),
        ({"Offset": "1e30 0 0"}, "from the origin"),
        ({"ElementNumberOfChannels": "2"}, "one channel"),
    ],
)
def test_metaimage_that_contradicts_itself_is_refused(fields: dict[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        read_volume(save_mha(tmp_path / "ct.mha", **fields))


def test_a_field_of_metaimage_that_is_given_twice(tmp_path: Path) -> None:
    for offset, fails in (("90 95 -60", False), ("0 0 0", True)):
        text = mha_text().replace("ElementDataFile", f"Offset = {offset}\nElementDataFile")
        (tmp_path / "ct.mha").write_bytes(text.encode() + patient_hu().tobytes(order="F"))
        if fails:
            with pytest.raises(InputError, match="'offset' a second time"):
                read_volume(tmp_path / "ct.mha")
        else:
            same_as_itk(tmp_path / "ct.mha", None)


NRRD: dict[str, tuple[dict[str, str | None], str | None]] = {
    "negative spacings": ({**NO_SPACE, "spacings": "8 9 -10"}, "'spacings' are negative"),
    "all negative": ({**NO_SPACE, "spacings": "-8 -9 -10"}, "'spacings' are negative"),
    "cell": ({**NO_SPACE, "spacings": "8 9 10", "axis_mins": "1 2 3", "centerings": "cell cell cell"}, "no directions"),
    "node": ({**NO_SPACE, "spacings": "8 9 10", "axis_mins": "1 2 3", "centerings": "node node node"}, "no directions"),
    "mixed": ({**NO_SPACE, "spacings": "8 9 10", "axis_mins": "1 2 3", "centers": "node cell node"}, "no directions"),
    "unknown": ({**NO_SPACE, "spacings": "8 9 10", "axis_mins": "1 2 3"}, "'centerings' are not known"),
    "???": ({**NO_SPACE, "spacings": "8 9 10", "axis_mins": "1 2 3", "centers": "??? cell ???"}, "are not known"),
    "reversed cell": (
        {**NO_SPACE, "spacings": "8 9 -10", "axis_mins": "1 2 3", "centerings": "cell cell cell"},
        "'spacings' are negative",
    ),
    "mins and maxs": (
        {**NO_SPACE, "spacings": "8 9 10", "axis_mins": "0 0 0", "axis_maxs": "192 198 200", "centers": "cell " * 3},
        "no directions",
    ),
    "no place": ({**NO_SPACE, "spacings": "8 9 10"}, "no place of the first voxel"),
    "centrings with directions": ({"centerings": "node node node"}, None),
    "measurement frame": ({"measurement_frame": "(1,0,0) (0,0,1) (0,1,0)"}, None),
    "las": ({"space": "left-anterior-superior"}, None),
    "right-handed": ({"space": "3D-right-handed"}, "left and right may be exchanged"),
    "byte skip -1": ({"byte_skip": "-1"}, None),
    "mirrored": ({"space_directions": "(8,0,0) (0,9,0) (0,0,-10)"}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", NRRD)
def test_nrrd_lies_where_itk_has_it(name: str, tmp_path: Path) -> None:
    fields, note = NRRD[name]
    same_as_itk(save_nrrd(tmp_path / "ct.nrrd", **fields), note)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"space": "right-up"}, "which NRRD does not have"),
        ({"space": "RPI"}, "which NRRD does not have"),
        ({"spacings": "1 1 1"}, "different sizes of voxels"),
        ({"space_units": "cm cm cm"}, "quotation marks"),
        ({"kinds": "domain domain time"}, "axis of kind 'time'"),
        ({"kinds": "list domain domain"}, "axis of kind 'list'"),
        ({"space_origin": "(1,2,3) (4,5,6)"}, "'space origin'"),
        ({"space_origin": "(1e30,0,0)"}, "from the origin"),
        ({"space_directions": "(8,0,0,1) (0,9,0,1) (0,0,10,1)"}, "no vectors of three numbers"),
        ({**NO_SPACE, "spacings": "8 9 10", "axis_mins": "0 0 0", "axis_maxs": "240 220 200"}, "contradict 'spacings'"),
        ({**NO_SPACE, "spacings": "8 9 10", "axis_mins": "0 0 0", "centerings": "left cell cell"}, "node or cell"),
        ({"space_directions": None, "spacings": "8 9 10", "axis_mins": "1 2 3"}, "gives the first voxel twice"),
        ({**NO_SPACE, "spacings": "8 9 10", "units": '"cm" "cm"'}, "quotation marks"),
    ],
)  # fmt: skip
def test_nrrd_that_contradicts_itself_is_refused(fields: dict[str, str | None], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        read_volume(save_nrrd(tmp_path / "ct.nrrd", **fields))


def test_spacings_with_an_origin_of_space(tmp_path: Path) -> None:
    volume = read_volume(save_nrrd(tmp_path / "ct.nrrd", space_directions=None, spacings="8 9 10"))
    np.testing.assert_allclose(volume.affine[:3, 3], (-90, -95, -60))
    assert any("gives no directions" in note for note in volume.notes)


@pytest.mark.parametrize(
    ("units", "steps", "origin"),
    [
        ('"cm" "cm" "cm"', "(-.8,0,0) (0,-.9,0) (0,0,1)", "(9,9.5,-6)"),
        ('"µm" "µm" "µm"', "(-8000,0,0) (0,-9000,0) (0,0,10000)", "(90000,95000,-60000)"),
        ('"mm" "mm" "cm"', "(-8,0,0) (0,-9,0) (0,0,1)", "(90,95,-6)"),
        ('"mm" "" "m"', "(-8,0,0) (0,-9,0) (0,0,.01)", "(90,95,-.06)"),
    ],
)
def test_units_of_every_axis_of_space_are_used(units: str, steps: str, origin: str, tmp_path: Path) -> None:
    path = save_nrrd(tmp_path / "ct.nrrd", space_units=units, space_directions=steps, space_origin=origin)
    volume = read_volume(path)
    np.testing.assert_allclose(volume.affine, patient_affine())
    assert any("converted to mm" in note for note in volume.notes)


def test_units_of_axes_without_directions(tmp_path: Path) -> None:
    fields: dict[str, Any] = {**NO_SPACE, "spacings": ".8 .9 10", "units": '"cm" "cm" "mm"'}
    volume = read_volume(save_nrrd(tmp_path / "ct.nrrd", **fields, axis_mins="1 2 3", centerings="node node node"))
    np.testing.assert_allclose(volume.affine[:3], [[-8, 0, 0, -10], [0, -9, 0, -20], [0, 0, 10, 3]])
    with pytest.raises(InputError, match="both 'units' and 'space units'"):
        read_volume(save_nrrd(tmp_path / "ct.nrrd", **fields, space_units='"cm" "cm" "cm"'))


def test_bytes_after_the_voxels_of_raw_data_are_noted(tmp_path: Path) -> None:
    voxels = patient_hu().tobytes(order="F") + b"\0" * 1000
    (tmp_path / "ct.raw").write_bytes(voxels)
    (tmp_path / "a.mha").write_bytes(mha_text().encode() + voxels)
    (tmp_path / "b.nrrd").write_bytes(nrrd_text().encode() + b"\n" + voxels)
    (tmp_path / "c.mhd").write_text(mha_text(ElementDataFile="ct.raw"))
    (tmp_path / "d.nhdr").write_text(nrrd_text(data_file="ct.raw"))
    for name in ("a.mha", "b.nrrd", "c.mhd", "d.nhdr"):
        assert read_volume(tmp_path / name).notes == ("1,000 bytes after the voxels are not read",)


def test_more_numbers_than_the_header_names_are_noted_in_every_encoding(tmp_path: Path) -> None:
    voxels = patient_hu().tobytes(order="F")
    numbers = " ".join(map(str, [*patient_hu().ravel(order="F"), 5, 6])).encode()
    for encoding, data in (
        ("gzip", gzip.compress(voxels + b"\0" * 500)), ("bzip2", bz2.compress(voxels + b"\0" * 500)),
        ("hex", voxels.hex().encode() + b"00ff"), ("ascii", numbers),
    ):  # fmt: skip
        (tmp_path / "ct.nrrd").write_bytes(nrrd_text(encoding=encoding).encode() + b"\n" + data)
        volume = read_volume(tmp_path / "ct.nrrd")
        np.testing.assert_array_equal(volume.array, patient_hu())
        assert len(volume.notes) == 1 and "after the voxels are not read" in volume.notes[0], encoding
    (tmp_path / "ct.mha").write_bytes(mha_text(CompressedData="True").encode() + zlib.compress(voxels + b"\0" * 500))
    assert read_volume(tmp_path / "ct.mha").notes == ("500 bytes after the voxels are not read",)


def test_a_data_file_for_two_slices_is_refused(tmp_path: Path) -> None:
    for k in range(SHAPE[2]):
        (tmp_path / f"s{k}.raw").write_bytes(patient_hu()[:, :, k].tobytes(order="F"))
    names = "".join(f"s{min(k, 18)}.raw\n" for k in range(SHAPE[2]))
    (tmp_path / "a.mhd").write_text(mha_text(ElementDataFile="LIST") + names)
    (tmp_path / "b.nhdr").write_text(nrrd_text() + "data file: LIST\n" + names)
    for name in ("a.mhd", "b.nhdr"):
        with pytest.raises(InputError, match="names a data file twice"):
            read_volume(tmp_path / name)


def test_axes_in_one_plane_are_refused(tmp_path: Path) -> None:
    rows = {"srow_x": [8, 8, 0, 0], "srow_y": [8, 8.01, 0, 0], "qform_code": 0}
    with pytest.raises(InputError, match="cannot be inverted"):
        read_volume(save_patient(tmp_path / "ct.nii", **rows))


NIFTI: dict[str, tuple[dict[str, Any], str | None]] = {
    "qfac 0": ({"sform_code": 0, "pixdim": [0, 8, 9, 10, 0, 0, 0, 0]}, None),
    "qfac -1": ({"sform_code": 0, "pixdim": [-1, 8, 9, 10, 0, 0, 0, 0]}, None),
    "qfac 2": ({"sform_code": 0, "pixdim": [2, 8, 9, 10, 0, 0, 0, 0]}, "qfac"),
    "qfac nan": ({"sform_code": 0, "pixdim": [np.nan, 8, 9, 10, 0, 0, 0, 0]}, "qfac"),
    "pixdim of another size": ({"qform_code": 0, "pixdim": [1, 1, 1, 1, 0, 0, 0, 0]}, "pixdim gives voxels"),
    "negative pixdim": ({"qform_code": 0, "pixdim": [1, -8, 9, 10, 0, 0, 0, 0]}, "pixdim gives voxels"),
    "NaN in pixdim": ({"qform_code": 0, "pixdim": [1, 8, 9, np.nan, 0, 0, 0, 0]}, "pixdim gives voxels"),
    "negative code": ({"sform_code": -1}, "sform_code is -1"),
    "left-handed": ({"srow_x": [-8, 0, 0, 90], "qform_code": 0}, None),
    "slope 0 with an intercept": ({"scl_slope": 0, "scl_inter": -1024}, "scl_inter of -1024 is not used"),
    "slope NaN": ({"scl_slope": np.nan}, None),
    "one volume in four dimensions": ({"dim": [4, *SHAPE, 1, 1, 1, 1]}, None),
    "bits of another type": ({"bitpix": 8}, "bitpix is 8"),
    "time units": ({"xyzt_units": 2 | 16}, None),
    "unknown unit": ({"xyzt_units": 4}, "unknown code 4"),
    "large pixels": (
        {"srow_x": [1, 0, 0, 0], "srow_y": [0, 1, 0, 0], "srow_z": [0, 0, 50, 0], "qform_code": 0,
         "pixdim": [1, 1, 1, 50, 0, 0, 0, 0]},
        "voxels are 1 × 1 × 50 mm large",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NIFTI)
def test_nifti_lies_where_nibabel_has_it(name: str, tmp_path: Path) -> None:
    fields, note = NIFTI[name]
    path = save_patient(tmp_path / "ct.nii", **fields)
    volume, loaded = read_volume(path), nib.load(path)
    np.testing.assert_allclose(volume.affine, loaded.affine, atol=1e-4)
    np.testing.assert_allclose(volume.array, loaded.get_fdata().reshape(SHAPE))
    assert [note in said for said in volume.notes] == ([True] if note else []), volume.notes


def test_codes_that_are_not_defined_are_taken_by_their_sign_as_itk_takes_them(tmp_path: Path) -> None:
    for fields in ({"sform_code": 9, "qform_code": 0}, {"sform_code": 0, "qform_code": 77}):
        same_as_itk(save_patient(tmp_path / "ct.nii", **fields), "which is not defined")
    fields = {"sform_code": 0, "pixdim": [-2, 8, 9, 10, 0, 0, 0, 0]}
    same_as_itk(save_patient(tmp_path / "ct.nii", **fields), "qfac")


def test_an_odd_offset_of_voxels_is_noted(tmp_path: Path) -> None:
    data = bytearray(save_patient(tmp_path / "a.nii", vox_offset=353).read_bytes())
    (tmp_path / "ct.nii").write_bytes(bytes(data[:352]) + b"\0" + bytes(data[352:]))
    volume = read_volume(tmp_path / "ct.nii")
    np.testing.assert_array_equal(volume.array, patient_hu())
    assert "vox_offset is 353" in volume.notes[0]


# -- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [400.0, 150.0, 0.01])
def test_voxels_of_no_ct_are_refused(step: float) -> None:
    with pytest.raises(InputError, match="mm large"):
        checked_volume(Volume(patient_hu()[:5, :5, :5], np.diag([step, step, step, 1.0])))


def test_unusual_voxels_are_noted() -> None:
    for steps in ((1, 1, 50), (0.08, 0.08, 0.08), (30, 30, 30)):
        notes = checked_volume(Volume(patient_hu(), np.diag([*steps, 1.0]))).notes
        assert len(notes) == 1 and "mm large, which is unusual" in notes[0]
        assert ("masks may be wrong" in notes[0]) == (max(steps) > 12)
    for steps in ((0.5, 0.5, 0.6), (1, 1, 10), (4, 4, 4)):
        assert checked_volume(Volume(patient_hu(), np.diag([*steps, 1.0]))).notes == ()


@pytest.mark.parametrize("distance", [1e30, 1e7, -1e7])
def test_scans_far_from_the_origin_are_refused(distance: float) -> None:
    affine = patient_affine()
    affine[1, 3] = distance
    with pytest.raises(InputError, match="from the origin"):
        checked_volume(Volume(patient_hu(), affine))
    assert FARTHEST_MM > 10_000


@pytest.mark.parametrize("spacing", [(400, 400, 400), (1, 1, LARGEST_VOXEL_MM + 1), (0, 1, 1), (-1, 1, 1)])
def test_spacings_of_a_processor_that_hide_a_patient_are_refused(spacing: tuple[float, float, float]) -> None:
    with pytest.raises(InputError, match="network's voxels are .* limit is 100 mm"):
        network_grid(Grid(SHAPE, patient_affine()), spacing=spacing)
