"""What is given in place of a DICOM series: folders of folders, archives, pointers, indices, other scans."""

from __future__ import annotations

import gzip
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dicom_series import along_z, dataset, series, write
from small_scans import save_mha, save_nrrd, save_patient

from mome.cli.main import main
from mome.errors import InputError
from mome.inference.scans import find_scans
from mome.volumes import read_volume
from mome.volumes.dicom import DicomOptions

POSITIONS = along_z(np.arange(6) * 3.0)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def refused(path: Path, what: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        for scan in find_scans([path]):
            read_volume(scan)
    text = str(caught.value)
    assert what in text and hint in text.splitlines()[-1] and len(text.splitlines()) <= 3, text


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("beside", [None, "DICOMDIR", "README.pdf"])
def test_a_folder_whose_slices_are_in_its_folders(tmp_path: Path, levels: int, beside: str | None) -> None:
    inner = write(tmp_path.joinpath("study", *"abcd"[:levels]), series(POSITIONS), "")
    if beside:
        (tmp_path / "study" / beside).write_bytes(b"x")
    hint = f"{tmp_path}/study/*" if levels == 1 and beside is None else str(inner)
    refused(tmp_path / "study", "in its folders" if beside else "no scans", hint)


def test_a_file_of_an_archive(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", series(POSITIONS))
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.write(folder / "001.dcm")
    shutil.make_archive(str(tmp_path / "t"), "tar", folder)
    packed = gzip.compress((folder / "001.dcm").read_bytes())
    (tmp_path / "one.dcm.gz").write_bytes(packed)
    refused(tmp_path / "s.zip", "a ZIP archive", "unpack it")
    refused(tmp_path / "t.tar", "a TAR archive", "unpack it")
    refused(tmp_path / "one.dcm.gz", "compressed by gzip", "decompress it")
    shutil.copy(tmp_path / "s.zip", tmp_path / "ct.nii.gz")
    refused(tmp_path / "ct.nii.gz", "a ZIP archive", "unpack it")
    (tmp_path / "only").mkdir()
    shutil.copy(tmp_path / "s.zip", tmp_path / "only")
    refused(tmp_path / "only", "s.zip is a ZIP archive", "unpack it")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "001.dcm.gz").write_bytes(packed)
    refused(tmp_path / "packed", "001.dcm.gz (compressed as a whole", "")
    (folder / "007.dcm.gz").write_bytes(packed)
    refused(folder, "1 slice cannot be read: 007.dcm.gz (compressed as a whole", "")


def test_an_archive_named_like_a_slice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "s.dcm", "w") as archive:
        archive.writestr("001.dcm", "x")
    refused(tmp_path, "s.dcm (a ZIP archive)", "unpack it")


def test_slices_in_folders_beside_slices_are_noted(tmp_path: Path) -> None:
    write(tmp_path, series(POSITIONS[:4])), write(tmp_path / "rest", series(POSITIONS[4:]))
    notes = read_volume(tmp_path).notes
    assert any("1 folders inside hold DICOM files, too, which are not read: rest" in note for note in notes)


@pytest.mark.parametrize("name", ["ct.nii.gz", "ct.nrrd", "ct.mha", "ct.dcm"])
def test_pointers_and_web_pages(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(POINTER)
    refused(tmp_path / name, "a Git LFS pointer", "git lfs pull")
    (tmp_path / name).write_bytes(b"<!DOCTYPE html><html>Sign in</html>")
    refused(tmp_path / name, "a web page", "download")


@pytest.mark.parametrize("ending", [".dcm", ""])
def test_a_pointer_among_slices(tmp_path: Path, ending: str) -> None:
    write(tmp_path / "some", series(POSITIONS), ending)
    (tmp_path / "some" / f"003{ending}").write_bytes(POINTER)
    refused(tmp_path / "some", f"003{ending} (a Git LFS pointer", "")
    for path in (tmp_path / "some").iterdir():
        path.write_bytes(POINTER)
    refused(tmp_path / "some", "a Git LFS pointer", "")


def test_a_dicomdir(tmp_path: Path) -> None:
    inner = write(tmp_path / "DICOM" / "S1", series(POSITIONS))
    index = dataset(POSITIONS[0], SOPClassUID="1.2.840.10008.1.3.10", Modality=None)
    del index.PixelData
    index.save_as(tmp_path / "DICOMDIR", enforce_file_format=True)
    shutil.copy(tmp_path / "DICOMDIR", tmp_path / "renamed.dcm")
    for name in ("DICOMDIR", "renamed.dcm"):
        refused(tmp_path / name, "a DICOMDIR", str(inner))
    (tmp_path / "renamed.dcm").unlink()
    refused(tmp_path, "in its folders", str(inner))


@pytest.mark.parametrize("series_chosen", ["1", 1, "1.2.3.4"])
def test_a_series_of_what_is_no_dicom(tmp_path: Path, series_chosen: str | int) -> None:
    for path in (
        save_patient(tmp_path / "ct.nii.gz"),
        save_nrrd(tmp_path / "ct.nrrd"),
        save_mha(tmp_path / "ct.mha"),
    ):
        with pytest.raises(InputError, match="there is no series .* holds one scan and is not DICOM(.*\n)*.*--series"):
            read_volume(path, dicom=DicomOptions(series=series_chosen))
    with pytest.raises(InputError, match="no such file"):
        read_volume(tmp_path / "none.nii.gz", dicom=DicomOptions(series=1))


def test_a_series_that_does_not_exist_has_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "s", series(POSITIONS))
    scan = save_patient(tmp_path / "ct.nii.gz")
    for given, words in ((folder, "there is no series '7': 1: CT, 6 slices"), (scan, "is not DICOM")):
        options = ["-p", "mandible", "-o", str(tmp_path / "o"), "--series", "7"]
        assert main(["segment", str(given), *options]) == 2
        assert words in capsys.readouterr().err
