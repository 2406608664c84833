"""What DICOM files hold: kinds of images, compressed pixels, HU, damaged files, several series."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_series import AXIAL, COLUMNS, ROWS, along_z, dataset, largest_hu_error, series, slice_hu, write
from pydicom.uid import UID

from mome.errors import InputError
from mome.volumes import read_volume
from mome.volumes.dicom import DicomOptions

POSITIONS = along_z(np.arange(6) * 3.0)


def refused(folder: Path, words: str, **options: Any) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read_volume(folder, dicom=DicomOptions(**options))
    assert len(str(caught.value).splitlines()) <= 3
    assert "Doe" not in str(caught.value) and "44871" not in str(caught.value)


# -- only CT ---------------------------------------------------------------------------------------------------

KINDS = {
    "MR": ("1.2.840.10008.5.1.4.1.1.4", "MR", {}),
    r"Nuclear Medicine \(NM\)": ("1.2.840.10008.5.1.4.1.1.20", "NM", {"NumberOfFrames": 1}),
    "Positron": ("1.2.840.10008.5.1.4.1.1.128", "PT", {}),
    r"Segmentation \(SEG\)": ("1.2.840.10008.5.1.4.1.1.66.4", "SEG", {}),
    r"Secondary Capture \(CT\)": ("1.2.840.10008.5.1.4.1.1.7", "CT", {}),
    r"RT Dose \(RTDOSE\)": ("1.2.840.10008.5.1.4.1.1.481.2", "RTDOSE", {}),
    "X-Ray 3D": ("1.2.840.10008.5.1.4.1.1.13.1.1", "XA", {}),
    "MR$|MR,": ("1.2.840.10008.5.1.4.1.1.2", "MR", {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_ct_is_refused(tmp_path: Path, name: str) -> None:
    sop_class, modality, changes = KINDS[name]
    write(tmp_path, series(POSITIONS, SOPClassUID=sop_class, Modality=modality, **changes))
    refused(tmp_path, f"(?m)not a CT.*({name})")


def test_colour_is_refused(tmp_path: Path) -> None:
    made = series(POSITIONS)
    for image in made:
        image.SamplesPerPixel, image.PhotometricInterpretation, image.PlanarConfiguration = 3, "RGB", 0
        image.BitsAllocated = image.BitsStored = 8
        image.HighBit, image.PixelRepresentation = 7, 0
        image.PixelData = bytes(ROWS * COLUMNS * 3)
    refused(write(tmp_path, made), "not a CT but a colour image, RGB")


def test_a_multi_frame_image_that_is_no_ct(tmp_path: Path) -> None:
    image = dataset(POSITIONS[0], SOPClassUID="1.2.840.10008.5.1.4.1.1.20", Modality="NM", NumberOfFrames=2)
    image.PixelData = image.PixelData * 2
    refused(write(tmp_path, [image]), "not a CT but Nuclear Medicine")


def test_maps_of_other_quantities_are_refused(tmp_path: Path) -> None:
    refused(write(tmp_path / "ed", series(POSITIONS, RescaleType="ED")), "no CT in HU: its values are not HU but ED")
    refused(write(tmp_path / "zero", series(POSITIONS, RescaleSlope=0)), "slope is 0")


# -- series ----------------------------------------------------------------------------------------------------


def test_several_series_are_listed_and_one_is_chosen(tmp_path: Path) -> None:
    write(tmp_path, series(POSITIONS, SeriesInstanceUID="1.2.7", SeriesNumber=7, SeriesDescription="Doe lungs"))
    write(tmp_path, series(POSITIONS[:4], SeriesInstanceUID="1.2.3", SeriesNumber=3))
    write(tmp_path, [dataset(POSITIONS[0], SOPClassUID=KINDS["MR"][0], SeriesInstanceUID="1.2.9", SeriesNumber=9)])
    refused(tmp_path, r"holds 3 DICOM series.*1: CT, 4 slices of 10 × 12; 2: CT, 6 .*; 3: not a CT.*\n.*\n.*--series 1")
    for chosen, count in ((1, 4), ("2", 6), ("1.2.3", 4), ("1.2.7", 6)):
        assert read_volume(tmp_path, dicom=DicomOptions(series=chosen)).shape[2] == count
    refused(tmp_path, "not a CT", series=3)
    for wrong in (0, 4, "1.2", ""):
        refused(tmp_path, "there is no series", series=wrong)


def test_objects_without_an_image_do_not_count_as_series(tmp_path: Path) -> None:
    structures = dataset(POSITIONS[0], SOPClassUID="1.2.840.10008.5.1.4.1.1.481.3", Modality="RTSTRUCT")
    del structures.PixelData
    write(tmp_path, [*series(POSITIONS), structures])
    volume = read_volume(tmp_path)
    assert volume.shape[2] == 6 and "files without an image are not read: 1 RT Structure Set (RTSTRUCT)" in volume.notes
    refused(write(tmp_path / "alone", [structures]), r"not a CT but RT Structure Set \(RTSTRUCT\), without an image")


def test_other_files_are_no_slices(tmp_path: Path) -> None:
    write(tmp_path, series(POSITIONS), ending="")
    for name in ("._001", ".DS_Store", "Thumbs.db", "DICOMDIR", "notes.txt", "report.json", "LICENSE"):
        (tmp_path / name).write_text("text")
    (tmp_path / "sub").mkdir()
    volume = read_volume(tmp_path)
    assert volume.shape[2] == 6
    assert not [note for note in volume.notes if "HU" not in note]  # the slices hold no air, which is said
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "no DICOM images")


def test_files_without_the_prefix_are_read(tmp_path: Path) -> None:
    write(tmp_path, series(POSITIONS))
    for path in tmp_path.iterdir():
        content = pydicom.dcmread(path)
        content.file_meta, content.preamble = pydicom.dataset.FileMetaDataset(), None
        content.save_as(path, implicit_vr=True, little_endian=True)
        assert path.read_bytes()[128:132] != b"DICM"
    volume = read_volume(tmp_path)
    assert volume.shape[2] == 6 and largest_hu_error(volume.array, volume.affine) < 1.1


# -- damaged files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".dcm", "", ".123456"])
@pytest.mark.parametrize("kept", [0, 60, 140, 400, 900, -30, -1])
def test_truncated_slices_are_named_and_refused_unless_asked(tmp_path: Path, kept: int, ending: str) -> None:
    write(tmp_path, series(POSITIONS), ending)
    path = tmp_path / f"003{ending}"
    path.write_bytes(path.read_bytes()[:kept])
    refused(tmp_path, rf"1 slice cannot be read: 003{ending} \(.*\n.*\n.*--allow-damaged")
    volume = read_volume(tmp_path, dicom=DicomOptions(allow_damaged=True))
    assert volume.shape[2] == 6 and any(f"003{ending}" in note for note in volume.notes)
    assert any("seem to be missing" in note for note in volume.notes)
    assert largest_hu_error(volume.array, volume.affine) < 1.1


def test_entries_that_are_no_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, series(POSITIONS))
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "link.dcm").symlink_to("nowhere")
    (tmp_path / "folder.dcm").mkdir()
    refused(tmp_path, r"2 slices cannot be read: link.dcm \(no regular file\); pipe.dcm")


def test_a_damaged_element_is_no_crash(tmp_path: Path) -> None:
    """pydicom converts an element only when it is used, and then raises errors of many types."""
    write(tmp_path, series(POSITIONS))
    path, whole = tmp_path / "003.dcm", (tmp_path / "003.dcm").read_bytes()
    random = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(whole)
        for place in random.integers(140, len(whole), random.integers(1, 8)):
            broken[place] = random.integers(256)
        path.write_bytes(broken)
        with contextlib.suppress(InputError):
            read_volume(tmp_path)


@pytest.mark.filterwarnings("ignore:Invalid value")  # by pydicom, of what is written here
def test_escape_sequences_are_not_printed(tmp_path: Path) -> None:
    refused(write(tmp_path / "a", series(POSITIONS, Modality="\x1b[31mM")), r"not a CT but \?\[31MM")
    write(tmp_path / "b", series(POSITIONS))
    (tmp_path / "b" / "\x1b[2J\n.dcm").write_bytes(b"")
    refused(tmp_path / "b", r"\?\[2J\?.dcm \(0 bytes\)")


def test_a_size_beyond_its_pixels_takes_no_memory(tmp_path: Path) -> None:
    made = series(POSITIONS)
    for image in made:
        image.Rows = image.Columns = 65535
    refused(write(tmp_path / "native", made), "001.dcm \\(truncated")
    made = series(POSITIONS)
    for image in made:
        image.compress(UID(RLE), generate_instance_uid=False)
        image.Rows = image.Columns = 65535
    refused(write(tmp_path / "rle", made), "has 65535 × 65535 × 6 voxels, more than can be read")


def test_a_folder_of_damaged_files(tmp_path: Path) -> None:
    for name in ("a.dcm", "b.dcm"):
        (tmp_path / name).write_bytes(b"")
    refused(tmp_path, "no DICOM image can be read: a.dcm")
    refused(tmp_path, "no DICOM image can be read: a.dcm", allow_damaged=True)


def test_many_damaged_files_are_counted(tmp_path: Path) -> None:
    write(tmp_path, series(POSITIONS))
    for number in range(10, 20):
        (tmp_path / f"{number}.dcm").write_bytes(np.random.default_rng(number).bytes(400))
    refused(tmp_path, "10 slices cannot be read: .*; and 5 more")


def test_a_damaged_slice_of_another_series_is_no_obstacle(tmp_path: Path) -> None:
    write(tmp_path, series(POSITIONS, SeriesInstanceUID="1.2.1", SeriesNumber=1))
    other = series(POSITIONS, SeriesInstanceUID="1.2.2", SeriesNumber=2)
    del other[0].ImagePositionPatient
    write(tmp_path, other)
    assert read_volume(tmp_path, dicom=DicomOptions(series=1)).shape[2] == 6
    refused(tmp_path, "1 slice cannot be read", series=2)


# -- pixels ----------------------------------------------------------------------------------------------------

JPEG_LOSSLESS, JPEG_LS, JPEG_2000, RLE = (f"1.2.840.10008.1.2.{number}" for number in ("4.70", "4.80", "4.90", "5"))


def gdcm_lossless(path: Path) -> None:
    """Compresses a file as JPEG lossless, which pydicom does not write."""
    gdcm = pytest.importorskip("gdcm")
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


@pytest.mark.parametrize("syntax", [JPEG_LOSSLESS, JPEG_LS, JPEG_2000, RLE, "1.2.840.10008.1.2.1.99"])
@pytest.mark.parametrize("signed", [0, 1])
def test_compressed_pixels(tmp_path: Path, syntax: str, signed: int) -> None:
    if syntax in (JPEG_LS, JPEG_2000):
        pytest.importorskip("jpeg_ls" if syntax == JPEG_LS else "openjpeg")
    intercept = 0 if signed else -1024
    made = [
        dataset(p, hu=slice_hu(p, AXIAL, 64, 48), PixelRepresentation=signed, RescaleIntercept=intercept)
        for p in POSITIONS
    ]
    for image in made:
        if syntax == "1.2.840.10008.1.2.1.99":
            image.file_meta.TransferSyntaxUID = UID(syntax)
        elif syntax != JPEG_LOSSLESS:
            image.compress(UID(syntax), generate_instance_uid=False)
    write(tmp_path, made)
    if syntax == JPEG_LOSSLESS:
        for path in tmp_path.iterdir():
            gdcm_lossless(path)
    assert pydicom.dcmread(next(tmp_path.iterdir())).file_meta.TransferSyntaxUID == syntax
    volume = read_volume(tmp_path)
    assert largest_hu_error(volume.array, volume.affine) < 1.1
    path = tmp_path / "003.dcm"
    path.write_bytes(path.read_bytes()[:-60])
    refused(tmp_path, "1 slice cannot be read: 003.dcm")


@pytest.mark.parametrize(
    ("syntax", "package"),
    [(JPEG_LOSSLESS, "python-gdcm"), (JPEG_LS, "pyjpegls"), (JPEG_2000, "pylibjpeg-openjpeg")],
)
def test_a_missing_decoder_is_named(tmp_path: Path, monkeypatch, syntax: str, package: str) -> None:
    made = series(POSITIONS)
    for image in made:
        image.file_meta.TransferSyntaxUID = UID(syntax)
        image.PixelData = pydicom.encaps.encapsulate([b"\0" * 40])
        image["PixelData"].is_undefined_length = True
    write(tmp_path, made)
    monkeypatch.setattr(pydicom.pixels.get_decoder(syntax), "_available", {})
    refused(tmp_path, rf"the package that decodes them is not installed\n.*\n.*{package}")


def test_an_unknown_compression_is_named(tmp_path: Path) -> None:
    made = series(POSITIONS)
    for image in made:
        image.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.100")  # MPEG2
        image.PixelData = pydicom.encaps.encapsulate([b"\0" * 40])
        image["PixelData"].is_undefined_length = True
    refused(write(tmp_path, made), "compressed as MPEG2.*cannot be decoded")


def test_pydicom_is_named_where_it_is_missing(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path, series(POSITIONS))
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    refused(tmp_path, r'pydicom, which is not installed\n.*\n.*pip install "mome\[dicom\]"')


def test_slope_and_intercept_of_each_slice(tmp_path: Path) -> None:
    made = [
        dataset(p, RescaleSlope=s, RescaleIntercept=b)
        for p, s, b in zip(POSITIONS, (1, 0.5, 2, 0.25, 1, 1), (-1024, 0, -1000, 10.5, 0, -8192), strict=True)
    ]
    volume = read_volume(write(tmp_path / "a", made))
    assert largest_hu_error(volume.array, volume.affine) < 1.1
    volume = read_volume(write(tmp_path / "b", series(POSITIONS, RescaleSlope=None, RescaleIntercept=None)))
    assert any("slope 1 and intercept 0" in note for note in volume.notes)
    assert largest_hu_error(volume.array, volume.affine) < 1.1


def test_one_slice_without_a_slope_is_damaged(tmp_path: Path) -> None:
    for keyword in ("RescaleSlope", "RescaleIntercept"):
        made = series(POSITIONS)
        delattr(made[2], keyword)
        refused(write(tmp_path / keyword, made), r"1 slice cannot be read: 004.dcm \(no valid RescaleSlope or")


@pytest.mark.parametrize(("signed", "value"), [(1, -2000), (0, 63536), (0, 0)])
def test_padding_is_air(tmp_path: Path, signed: int, value: int) -> None:
    made = series(POSITIONS, PixelRepresentation=signed)
    for image in made:
        image.add_new("PixelPaddingValue", "SS" if signed else "US", value)
        stored = np.frombuffer(image.PixelData, "<u2").copy()
        stored[:5] = value % 65536
        image.PixelData = stored.tobytes()
        if not signed:
            image.BitsStored, image.HighBit = 12, 11  # 63536 uses bits above those that are stored
    volume = read_volume(write(tmp_path, made))
    assert (volume.array[:5, 0] == -1024).all() and (volume.array[5:, 0] > -1024).all()
    assert any("30 pixels have the padding value" in note for note in volume.notes)


def test_a_range_of_padding_and_a_value_of_the_wrong_sign(tmp_path: Path) -> None:
    made = series(POSITIONS)
    for image in made:
        image.add_new("PixelPaddingValue", "US", 63536)  # −2000 in the type of unsigned pixels
        image.add_new("PixelPaddingRangeLimit", "US", 63530)
        stored = np.frombuffer(image.PixelData, "<i2").copy()
        stored[:3] = (-2000, -2003, -2006)
        image.PixelData = stored.tobytes()
    volume = read_volume(write(tmp_path, made))
    assert (volume.array[:3, 0] == -1024).all() and volume.array[3:, 0].min() > -1024


def test_overlays_in_unused_bits_are_no_values(tmp_path: Path) -> None:
    made = series(POSITIONS, PixelRepresentation=0, BitsStored=12, HighBit=11)
    for image in made:
        image.PixelData = (np.frombuffer(image.PixelData, "<u2") | 0x8000).tobytes()
    volume = read_volume(write(tmp_path, made))
    assert largest_hu_error(volume.array, volume.affine) < 1.1


@pytest.mark.parametrize("kind", ["MIP", "MINIP", "PROJECTION IMAGE", "CSA MIP", "CT_SOM5_MIP"])
def test_projections_over_slices_are_refused(tmp_path: Path, kind: str) -> None:
    slices = series(POSITIONS)
    for image in slices:
        image.ImageType = ["DERIVED", "SECONDARY", "AXIAL", kind]
    write(tmp_path, slices)
    refused(tmp_path, "projection over several slices")


@pytest.mark.parametrize("kind", ["CT_SOM7 IODINE MAP", "DENSITY", "CSA VRT"])
def test_parts_of_the_image_type_say_what_is_no_hu(tmp_path: Path, kind: str) -> None:
    write(tmp_path, series(POSITIONS, ImageType=["DERIVED", "SECONDARY", "AXIAL", kind]))
    refused(tmp_path, "ImageType says")


@pytest.mark.parametrize(
    ("key", "value", "differs"),
    [
        ("PatientName", "Roe^Richard", True),
        ("PatientName", "DOE^JANE^^", False),
        ("PatientName", "", False),
        ("PatientBirthDate", "19700101", True),
        ("PatientSex", "M", True),
    ],
)
def test_slices_that_name_two_patients_have_a_note(tmp_path: Path, key: str, value: str, differs: bool) -> None:
    """PatientID may be shared by mistake; the note does not say who they are."""
    slices = series(POSITIONS, PatientSex="F")
    setattr(slices[2], key, value)
    write(tmp_path, slices)
    notes = " ".join(read_volume(tmp_path).notes)
    assert ("are they of one patient?" in notes) is differs
    assert "Doe" not in notes and "Roe" not in notes


@pytest.mark.parametrize("key", ["PatientID", "StudyInstanceUID", "FrameOfReferenceUID", "ConvolutionKernel"])
def test_slices_of_two_origins_are_refused(tmp_path: Path, key: str) -> None:
    """Two reconstructions, studies or patients under one SeriesInstanceUID would become one volume of both."""
    slices = series(POSITIONS)
    for number, image in enumerate(slices):
        setattr(image, key, f"1.2.{number % 2}")
    write(tmp_path, slices)
    refused(tmp_path, "several patients, studies, frames of reference or kernels")
