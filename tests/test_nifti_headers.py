"""Geometry in headers: NIfTI transforms that come back as they came, units, damaged streams, NRRD and MetaImage."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from small_scans import (
    SHAPE,
    SPACING,
    mha_text,
    nrrd_text,
    patient_affine,
    patient_bytes,
    patient_hu,
    patient_image,
    save_mha,
    save_nrrd,
    save_patient,
)

from mome.errors import InputError
from mome.volumes import Grid, read_label_map, read_volume, write_mask

TRANSFORMS = (
    "sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units",
)  # fmt: skip


def rotated(degrees: float) -> np.ndarray:
    affine = patient_affine()
    affine[:3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix() @ affine[:3]
    return affine


def transforms(path: Path) -> dict[str, Any]:
    header = nib.load(path).header
    return {name: np.asarray(header[name]).tolist() for name in TRANSFORMS} | {"pixdim": header["pixdim"][:4].tolist()}


def variants() -> dict[str, nib.Nifti1Image]:
    images = {name: patient_image() for name in ("plain", "disagree", "no sform", "no qform", "neither", "sheared")}
    images["disagree"].set_sform(rotated(20), code=2)
    images["no sform"].set_sform(None, code=0)
    images["no qform"].set_qform(None, code=0)
    images["neither"].set_sform(None, code=0)
    images["neither"].set_qform(None, code=0)
    sheared = patient_affine()
    sheared[1, 2] = 3.0
    images["sheared"].set_sform(sheared, code=4)
    for name, code in (("metre", 1), ("micrometre", 3)):
        scale = {1: 1e-3, 3: 1e3}[code]
        affine = np.diag([scale, scale, scale, 1]) @ patient_affine()
        images[name] = patient_image(affine=affine)
        images[name].header["xyzt_units"] = code | 8
    images["other codes"] = patient_image()
    images["other codes"].set_sform(patient_affine(), code=3)
    images["other codes"].set_qform(patient_affine(), code=2)
    images["zero sform"] = patient_image()
    for row in "xyz":
        images["zero sform"].header[f"srow_{row}"] = 0
    return images


@pytest.mark.parametrize("name", variants())
def test_a_mask_keeps_the_scans_transforms_codes_and_units(name: str, tmp_path: Path) -> None:
    scan = tmp_path / "ct.nii.gz"
    # the affine is left out, because nibabel would write it over the header's transforms
    image = variants()[name]
    nib.save(nib.Nifti1Image(patient_hu(), None, image.header), scan)
    volume = read_volume(scan)
    mask = write_mask(tmp_path / "m.nii.gz", patient_hu() > 0, volume.grid, volume.header)
    assert transforms(mask) == transforms(scan)


def test_itk_sees_scan_and_mask_in_one_place(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    for name, image in variants().items():
        if name in ("sheared", "zero sform"):
            continue  # ITK refuses both
        scan = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(patient_hu(), None, image.header), scan)
        volume = read_volume(scan)
        mask = write_mask(tmp_path / "m.nii.gz", patient_hu() > 0, volume.grid, volume.header)
        one, other = sitk.ReadImage(str(scan)), sitk.ReadImage(str(mask))
        corner = [n - 1 for n in SHAPE]
        for index in ([0, 0, 0], corner):
            apart = np.subtract(one.TransformIndexToPhysicalPoint(index), other.TransformIndexToPhysicalPoint(index))
            assert np.abs(apart).max() < 1e-3, name


@pytest.mark.parametrize("flip", [1, -1])
@pytest.mark.parametrize("codes", [{}, {"sform_code": 1, "qform_code": 1}, {"sform_code": 0, "qform_code": 1}])
def test_a_sheared_affine_is_in_the_sform_alone(codes: dict[str, int], flip: int, tmp_path: Path) -> None:
    """The qform of a mask of NRRD, MetaImage or an array lay some mm elsewhere, with a code that calls it right."""
    shear = np.eye(4)
    shear[1, 2] = 0.9  # 0.2 mm per mm of height
    upright = np.diag([0.8 * flip, 0.8, 3.0, 1.0])
    for affine, code in ((upright @ shear, 0), (upright, 1), (upright @ (np.eye(4) + 1e-7), 1)):
        affine[3] = 0, 0, 0, 1
        grid = Grid((50, 60, 40), affine)
        path = write_mask(tmp_path / "mask.nii.gz", np.ones(grid.shape, np.uint8), grid, codes)
        header = nib.load(path).header
        assert int(header["qform_code"]) == code
        assert int(header["sform_code"]) == (1 if code == 0 else codes.get("sform_code", 1))
        stored = read_label_map(path)
        assert stored.grid.same_as(grid) and not stored.notes


def test_the_mask_of_another_grid_does_not_get_the_scans_transforms(tmp_path: Path) -> None:
    volume = read_volume(save_patient(tmp_path / "ct.nii"))
    part = volume.grid.crop(2, 3, 9)
    mask = write_mask(tmp_path / "m.nii.gz", np.ones(part.shape), part, volume.header)
    np.testing.assert_allclose(nib.load(mask).affine, part.affine, atol=1e-4)


NOTES = {
    "plain": None,
    "disagree": "sform and qform disagree by",
    "no sform": None,
    "no qform": None,
    "neither": "neither sform nor qform",
    "metre": "unit is the metre",
    "micrometre": "unit is the micrometre",
    "zero sform": "sform cannot be inverted; the qform is used",
}


@pytest.mark.parametrize("name", NOTES)
def test_decisions_about_transforms_are_noted(name: str, tmp_path: Path) -> None:
    image = variants()[name]
    nib.save(nib.Nifti1Image(patient_hu(), None, image.header), tmp_path / "ct.nii")
    volume = read_volume(tmp_path / "ct.nii")
    assert [NOTES[name] in note for note in volume.notes] == ([True] if NOTES[name] else [])
    expected = {"disagree": rotated(20), "neither": nib.load(tmp_path / "ct.nii").affine}.get(name, patient_affine())
    np.testing.assert_allclose(volume.affine, expected, atol=1e-2)


@pytest.mark.parametrize("byte_order", "<>")
def test_both_byte_orders_and_types_are_read_as_nibabel_reads_them(byte_order: str, tmp_path: Path) -> None:
    for kind in ("i2", "u1", "i4", "u2", "i1", "f4", "f8", "i8", "u4"):
        array = np.clip(patient_hu(), np.iinfo(kind).min if kind[0] in "iu" else -1e9, 120).astype(kind)
        header = nib.Nifti1Header(endianness=byte_order)
        header.set_data_dtype(kind)
        image = nib.Nifti1Image(array, rotated(10), header)
        image.header.set_slope_inter(1.5, -200)
        nib.save(image, tmp_path / "ct.nii.gz")
        loaded = nib.load(tmp_path / "ct.nii.gz")
        volume = read_volume(tmp_path / "ct.nii.gz", any_values=True)
        np.testing.assert_allclose(volume.array, loaded.get_fdata(), rtol=1e-6, atol=1e-3)
        np.testing.assert_allclose(volume.affine, loaded.affine, atol=1e-5)


# -- damaged files -------------------------------------------------------------------------------------------


def test_a_damaged_stream_is_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    whole = gzip.compress(patient_bytes())
    for at in range(40, len(whole), len(whole) // 12):
        damaged = bytearray(whole)
        end = min(at + 64, len(whole))
        damaged[at:end] = bytes(255 - byte for byte in damaged[at:end])
        (tmp_path / "ct.nii.gz").write_bytes(damaged)
        with pytest.raises(InputError):
            read_volume(tmp_path / "ct.nii.gz")


@pytest.mark.parametrize("flip", [-8, -4, -1])
def test_the_checksum_at_the_end_is_tested(flip: int, tmp_path: Path) -> None:
    damaged = bytearray(gzip.compress(patient_bytes()))
    damaged[flip] ^= 1
    (tmp_path / "ct.nii.gz").write_bytes(damaged)
    with pytest.raises(InputError, match="truncated or damaged"):
        read_volume(tmp_path / "ct.nii.gz")


def test_streams_of_several_members_and_padding_are_read(tmp_path: Path) -> None:
    data = patient_bytes()
    parts = gzip.compress(data[:5000]) + gzip.compress(data[5000:]) + b"\0" * 512
    (tmp_path / "ct.nii.gz").write_bytes(parts)
    np.testing.assert_array_equal(read_volume(tmp_path / "ct.nii.gz").array, patient_hu())
    (tmp_path / "ct.nii.gz").write_bytes(data)  # not compressed, in spite of its name
    np.testing.assert_array_equal(read_volume(tmp_path / "ct.nii.gz").array, patient_hu())
    (tmp_path / "ct.nii.gz").write_bytes(gzip.compress(data) + b"garbage")
    with pytest.raises(InputError, match="truncated or damaged"):
        read_volume(tmp_path / "ct.nii.gz")


def test_bytes_after_the_voxels_are_noted(tmp_path: Path) -> None:
    (tmp_path / "ct.nii").write_bytes(patient_bytes() + b"\0" * 1000)
    assert read_volume(tmp_path / "ct.nii").notes == ("1,000 bytes after the voxels are not read",)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vox_offset": np.inf}, "vox_offset is inf"),
        ({"vox_offset": np.nan}, "vox_offset is nan"),
        ({"vox_offset": -352}, "vox_offset"),
        ({"vox_offset": 100}, "vox_offset"),
        ({"vox_offset": 1e30}, "vox_offset"),
        ({"vox_offset": 1e9}, "cannot hold them"),
        ({"dim": [3, -2, 22, 20, 1, 1, 1, 1]}, "dim is"),
        ({"dim": [3, 0, 22, 20, 1, 1, 1, 1]}, "dim is"),
        ({"dim": [-3, 24, 22, 20, 1, 1, 1, 1]}, "dim is"),
        ({"dim": [12, 24, 22, 20, 1, 1, 1, 1]}, "dim is"),
        ({"dim": [3, 240, 220, 200, 1, 1, 1, 1]}, "cannot hold them"),
        ({"dim": [7, 32767, 32767, 32767, 32767, 32767, 32767, 32767]}, "voxels"),
        ({"datatype": 128}, "colour image"),
        ({"datatype": 1792}, "type 1792"),
        ({"datatype": 999}, "type 999"),
        ({"magic": b"ni1"}, "lie in an .img file"),
        ({"magic": b"abc"}, "not a NIfTI file"),
        ({"sizeof_hdr": 347}, "not a NIfTI file"),
        ({"scl_slope": 1, "scl_inter": np.nan}, "scl_inter is nan"),
        ({"srow_x": [np.nan] * 4, "qform_code": 0}, "cannot be inverted"),
        ({"srow_x": [0] * 4, "qform_code": 0}, "cannot be inverted"),
        ({"pixdim": [1, 0, 0, 0, 0, 0, 0, 0], "qform_code": 0, "sform_code": 0}, "cannot be inverted"),
    ],
)
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_impossible_fields_are_the_users_to_mend(fields: dict, words: str, ending: str, tmp_path: Path) -> None:
    path = save_patient(tmp_path / f"ct.{ending}", **fields)
    with pytest.raises(InputError, match=words) as caught:
        read_volume(path)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) <= 3


# -- NRRD and MetaImage --------------------------------------------------------------------------------------


def test_nrrd_and_metaimage_are_where_itk_has_them(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(patient_hu().transpose(2, 1, 0))
    image.SetSpacing(SPACING)
    image.SetOrigin((3, 4, 5))
    image.SetDirection(Rotation.from_euler("xyz", (10, 20, 30), degrees=True).as_matrix().ravel().tolist())
    for ending in ("nrrd", "nhdr", "mha", "mhd", "nii.gz"):
        for compress in (False, True):
            path = tmp_path / f"ct.{ending}"
            sitk.WriteImage(image, str(path), compress)
            volume = read_volume(path)
            np.testing.assert_array_equal(volume.array, patient_hu())
            for index in ((0, 0, 0), (5, 6, 7)):
                world = (volume.affine @ [*index, 1])[:3] * (-1, -1, 1)
                np.testing.assert_allclose(world, image.TransformIndexToPhysicalPoint(index), atol=1e-3)


def test_nrrd_fields_that_are_left_open_are_noted(tmp_path: Path) -> None:
    for fields, note in (
        ({"space": None, "space_dimension": "3"}, "names no space"),
        ({"space": "scanner-xyz"}, "unknown space 'scanner-xyz'"),
        ({"space_origin": None}, "no 'space origin'"),
        ({"space_units": '"m" "m" "m"', "space_directions": "(-.008,0,0) (0,-.009,0) (0,0,.01)"}, "unit is 'm'"),
        ({"space": None, "space_directions": None, "space_origin": None, "spacings": "8 9 10"}, "gives no directions"),
    ):
        volume = read_volume(save_nrrd(tmp_path / "ct.nrrd", **fields))
        assert any(note in said for said in volume.notes), volume.notes
        np.testing.assert_allclose(volume.spacing, SPACING)
        np.testing.assert_array_equal(volume.array, patient_hu())
    for space, letters in (("RAS", "LPS"), ("left-anterior-superior", "RPS"), ("LPS", "RAS")):
        assert read_volume(save_nrrd(tmp_path / "ct.nrrd", space=space)).grid.orientation == letters
    with pytest.raises(InputError, match="size of its voxels is not known"):
        read_volume(save_nrrd(tmp_path / "ct.nrrd", space_directions=None))


def test_frames_of_four_dimensional_nrrd_and_metaimage(tmp_path: Path) -> None:
    later = patient_hu() + 7
    last = np.stack([patient_hu(), later], -1)
    first = np.stack([patient_hu(), later], 0)
    shape = " ".join(map(str, SHAPE))
    step = " ".join(nrrd_text().split("space directions: ")[1].splitlines()[0].split())
    files = [
        save_nrrd(
            tmp_path / "a.nrrd", last, dimension="4", sizes=f"{shape} 2", kinds="domain domain domain list",
            space_directions=f"{step} none",
        ),
        save_nrrd(
            tmp_path / "b.nrrd", first, dimension="4", sizes=f"2 {shape}", kinds="list domain domain domain",
            space_directions=f"none {step}",
        ),
        save_mha(
            tmp_path / "c.mha", last, NDims="4", DimSize=f"{shape} 2", ElementSpacing="8 9 10 1", Offset="90 95 -60 0",
            TransformMatrix="-1 0 0 0 0 -1 0 0 0 0 1 0 0 0 0 1",
        ),
    ]  # fmt: skip
    for path in files:
        for frame, expected in ((0, patient_hu()), (1, later)):
            volume = read_volume(path, frame=frame)
            np.testing.assert_array_equal(volume.array, expected)
            np.testing.assert_allclose(volume.affine, patient_affine())
        with pytest.raises(InputError, match="holds 2 volumes"):
            read_volume(path)
        with pytest.raises(InputError, match="frame 5 of 2"):
            read_volume(path, frame=5)


def test_every_encoding_is_read(tmp_path: Path) -> None:
    import bz2

    voxels = patient_hu().tobytes(order="F")
    text = " ".join(map(str, patient_hu().ravel(order="F"))).encode()
    for encoding, data in (
        ("raw", voxels), ("gzip", gzip.compress(voxels)), ("bz2", bz2.compress(voxels)), ("ascii", text),
        ("hex", voxels.hex().encode()),
    ):  # fmt: skip
        (tmp_path / "ct.nrrd").write_bytes(nrrd_text(encoding=encoding).encode() + b"\n" + data)
        np.testing.assert_array_equal(read_volume(tmp_path / "ct.nrrd").array, patient_hu())
    (tmp_path / "ct.mha").write_bytes(mha_text(BinaryData="False").encode() + text)
    np.testing.assert_array_equal(read_volume(tmp_path / "ct.mha").array, patient_hu())
    big = patient_hu().astype(">i2").tobytes(order="F")
    (tmp_path / "ct.mha").write_bytes(mha_text(BinaryDataByteOrderMSB="True").encode() + big)
    np.testing.assert_array_equal(read_volume(tmp_path / "ct.mha").array, patient_hu())
    (tmp_path / "ct.nrrd").write_bytes(nrrd_text(endian="big").encode() + b"\n" + big)
    np.testing.assert_array_equal(read_volume(tmp_path / "ct.nrrd").array, patient_hu())


def test_slices_in_files_of_their_own_are_read(tmp_path: Path) -> None:
    for k in range(SHAPE[2]):
        (tmp_path / f"s{k + 1:03d}.raw").write_bytes(patient_hu()[:, :, k].tobytes(order="F"))
    names = "".join(f"s{k + 1:03d}.raw\n" for k in range(SHAPE[2]))
    headers = {
        "a.nhdr": nrrd_text(data_file=f"s%03d.raw 1 {SHAPE[2]} 1"),
        "b.nhdr": nrrd_text() + "data file: LIST\n" + names,
        "c.mhd": mha_text(ElementDataFile=f"s%03d.raw 1 {SHAPE[2]} 1"),
        "d.mhd": mha_text(ElementDataFile="LIST") + names,
    }
    for name, text in headers.items():
        (tmp_path / name).write_text(text)
        np.testing.assert_array_equal(read_volume(tmp_path / name).array, patient_hu())
