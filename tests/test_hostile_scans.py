"""Scans from a hostile world: headers, places, sizes and entries of folders that must not end or mislead a run."""

from __future__ import annotations

import gzip
import json
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from small_scans import (
    SHAPE,
    mha_text,
    nrrd_text,
    patient_affine,
    patient_hu,
    patient_image,
    save_mha,
    save_nrrd,
    save_patient,
)
from stand_in_models import Threshold

from mome.cli.main import main
from mome.data.case_folder import CaseFolder
from mome.errors import InputError
from mome.inference import Segmenter, segment_folder
from mome.inference.fingerprint import scan_identity
from mome.inference.scans import find_scans
from mome.metrics import evaluate_folder
from mome.processing import MoMEProcessor
from mome.volumes import Grid, Volume, network_grid, read_label_map, read_label_table, read_volume
from mome.volumes.sizes import LONGEST_MM, MOST_VOXELS

VOXELS = patient_hu().tobytes(order="F")


def segmenter() -> Segmenter:
    return Segmenter(Threshold(0.5), MoMEProcessor(spacing=[8, 9, 10], hu_window=[-1000, 1000]))


# -- headers -------------------------------------------------------------------------------------------------


def test_long_comments_and_keys_of_nrrd_are_read(tmp_path: Path) -> None:
    head = nrrd_text()
    for extra in ("# " + "c" * 1_000, "# " + "c" * 500_000, "key:=" + "v" * 200_000, "content: " + "x" * 9_000):
        (tmp_path / "ct.nrrd").write_bytes(f"{head}{extra}\n\n".encode() + VOXELS)
        np.testing.assert_array_equal(read_volume(tmp_path / "ct.nrrd").array, patient_hu())


NRRD_HEADERS: dict[str, tuple[dict[str, str | None], str]] = {
    "kinds of 5,000 characters": ({"kinds": "k" * 5_000}, "'kinds' has 1 words"),
    "many kinds": ({"kinds": "domain " * 5_000}, "'kinds' has 5000 words"),
    "no sizes": ({"sizes": None}, "no 'sizes'"),
    "too few sizes": ({"sizes": "24 22"}, "'sizes' has 3 numbers"),
    "negative size": ({"sizes": "24 -22 20"}, "whole number"),
    "size of words": ({"sizes": "a b c"}, "whole number"),
    "huge sizes": ({"sizes": "99999999 99999999 99999999"}, "GB in memory"),
    "many digits": ({"sizes": "24 22 " + "9" * 5_000}, "whole number"),
    "dimension 99999": ({"dimension": "99999"}, "from 1 to 16"),
    "dimension of words": ({"dimension": "three"}, "from 1 to 16"),
    "no type": ({"type": None}, "no 'type'"),
    "block": ({"type": "block"}, "is not read"),
    "odd encoding": ({"encoding": "zstd"}, "is not read"),
    "no byte order": ({"endian": None}, "byte order is not known"),
    "negative skip": ({"byte_skip": "-5"}, "'byte skip'"),
    "skip beyond the end": ({"byte_skip": "99999999"}, "ends before its voxels"),
    "lines beyond the end": ({"line_skip": "99999"}, "before its voxels|cannot hold"),
    "directions of words": ({"space_directions": "(a,b,c) (0,1,0) (0,0,1)"}, "'space directions'"),
    "two directions": ({"space_directions": "(1,0,0) (0,1,0)"}, "'space directions'"),
    "no brackets": ({"space_directions": "1 0 0 0 1 0 0 0 1"}, "'space directions'"),
    "short directions": ({"space_directions": "(1,0) (0,1) (1,1)"}, "no vectors of three numbers"),
    "NaN directions": ({"space_directions": "(nan,0,0) (0,1,0) (0,0,1)"}, "cannot be inverted"),
    "flat directions": ({"space_directions": "(8,0,0) (8,0,0) (0,0,10)"}, "cannot be inverted"),
    "all none": ({"space_directions": "none none none"}, "0 axes of space"),
    "colour": ({"kinds": "RGB-color domain domain"}, "one channel"),
    "longer than the file": ({"sizes": "240 220 200"}, "cannot hold them"),
}


@pytest.mark.parametrize("name", NRRD_HEADERS)
def test_impossible_nrrd_headers_are_refused(name: str, tmp_path: Path) -> None:
    fields, words = NRRD_HEADERS[name]
    path = save_nrrd(tmp_path / "ct.nrrd", **fields)
    with pytest.raises(InputError, match=words) as caught:
        read_volume(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600


MHA_HEADERS: dict[str, tuple[dict[str, str | None], str]] = {
    "NDims 99999": ({"NDims": "99999"}, "from 1 to 10"),
    "NDims -3": ({"NDims": "-3"}, "from 1 to 10"),
    "NDims of many digits": ({"NDims": "3" * 5_000}, "from 1 to 10"),
    "NDims of words": ({"NDims": "three"}, "from 1 to 10"),
    "NDims 2": ({"NDims": "2", "DimSize": "24 22"}, "three dimensions"),
    "no DimSize": ({"DimSize": None}, "no 'DimSize'"),
    "huge DimSize": ({"DimSize": "100000 100000 100000"}, "GB in memory"),
    "negative DimSize": ({"DimSize": "24 -22 20"}, "whole number"),
    "no spacing": ({"ElementSpacing": None}, "size of its voxels is not known"),
    "spacing of words": ({"ElementSpacing": "a b c"}, "ElementSpacing"),
    "spacing 0": ({"ElementSpacing": "0 0 0"}, "cannot be inverted"),
    "spacing inf": ({"ElementSpacing": "1 1 inf"}, "cannot be inverted"),
    "long matrix": ({"TransformMatrix": "1 " * 5_000}, "TransformMatrix"),
    "zero matrix": ({"TransformMatrix": "0 " * 9}, "cannot be inverted"),
    "channels": ({"ElementNumberOfChannels": "3"}, "one channel"),
    "odd type": ({"ElementType": "MET_" + "X" * 5_000}, "is not read"),
    "longer than the file": ({"DimSize": "240 220 200"}, "cannot hold them"),
    "not compressed": ({"CompressedData": "True"}, "truncated or damaged"),
    "slope 0": ({"ElementToIntensityFunctionSlope": "0"}, "Slope"),
    "slope nan": ({"ElementToIntensityFunctionSlope": "nan"}, "Slope"),
}


@pytest.mark.parametrize("name", MHA_HEADERS)
def test_impossible_metaimage_headers_are_refused(name: str, tmp_path: Path) -> None:
    fields, words = MHA_HEADERS[name]
    path = save_mha(tmp_path / "ct.mha", **fields)
    with pytest.raises(InputError, match=words) as caught:
        read_volume(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("ending", ["nrrd", "nhdr", "mha", "mhd", "nii", "nii.gz"])
def test_files_of_nothing_and_of_noise_are_refused(ending: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 5_000, dtype=np.uint8).tobytes()
    for content in (b"", b"\0" * 5_000, b"\n" * 5_000, noise, b"NRRD0004\n", b"NDims = 3\n" * 3, b"x" * 3_000_000):
        (tmp_path / f"ct.{ending}").write_bytes(content)
        with pytest.raises(InputError):
            read_volume(tmp_path / f"ct.{ending}")
        with pytest.raises(InputError):
            read_label_map(tmp_path / f"ct.{ending}")


# -- data files of headers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["absolute", "parent", "deep parent", "link", "list", "pattern"])
def test_data_files_lie_beside_their_header(place: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret" / "ct.raw"
    folder = tmp_path / "scans"
    (folder / "sub").mkdir(parents=True)
    secret.parent.mkdir()
    secret.write_bytes(VOXELS)
    (folder / "link.raw").symlink_to(secret)
    name = {
        "absolute": str(secret),
        "parent": "../secret/ct.raw",
        "deep parent": "sub/../../secret/ct.raw",
        "link": "link.raw",
        "list": f"LIST\n{secret}",
        "pattern": "../secret/ct%d.raw 1 20 1",
    }[place]
    (folder / "a.mhd").write_text(mha_text(ElementDataFile=name))
    (folder / "b.nhdr").write_text(nrrd_text() + f"data file: {name}\n")
    (folder / "c.mha").write_text(mha_text(ElementDataFile=name))
    for path in ("a.mhd", "b.nhdr", "c.mha"):
        with pytest.raises(InputError, match="outside its own folder"):
            read_volume(folder / path)
        assert scan_identity(folder / path)["bytes"] == (folder / path).stat().st_size


def test_data_files_inside_the_folder_are_read(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "ct.raw").write_bytes(VOXELS)
    (tmp_path / "a.mhd").write_text(mha_text(ElementDataFile="sub/ct.raw"))
    (tmp_path / "b.nhdr").write_text(nrrd_text() + "data file: ./sub/ct.raw\n")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "a.mhd", tmp_path / "b.nhdr", Path("a.mhd"), Path("b.nhdr")):
        np.testing.assert_array_equal(read_volume(path).array, patient_hu())
    os.mkfifo(tmp_path / "sub" / "pipe.raw")
    (tmp_path / "c.mhd").write_text(mha_text(ElementDataFile="sub/pipe.raw"))
    with pytest.raises(InputError, match="not a regular file"):
        read_volume(tmp_path / "c.mhd")


@pytest.mark.parametrize("ending", ["mhd", "nhdr"])
def test_resume_notices_other_voxels_behind_the_same_header(ending: str, tmp_path: Path) -> None:
    scan, data, out = tmp_path / "in" / f"ct.{ending}", tmp_path / "in" / "ct.raw", tmp_path / "out"
    scan.parent.mkdir()
    data.write_bytes(VOXELS)
    scan.write_text(mha_text(ElementDataFile="ct.raw") if ending == "mhd" else nrrd_text() + "data file: ct.raw\n")

    def skipped() -> bool:
        (entry,) = segment_folder(segmenter(), [scan], out, ["liver"], resume=True)
        assert entry["status"] == "done", entry
        return entry.get("skipped", False)

    assert not skipped() and skipped()
    data.write_bytes((patient_hu()[::-1]).tobytes(order="F"))
    os.utime(data, ns=(1, 1))  # older than the header, and of the same size
    assert not skipped() and skipped()


# -- entries of folders --------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
def test_a_folder_run_names_what_is_no_scan_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    save_patient(folder / "z.nii.gz")
    save_mha(folder / "y.MHA")
    save_patient(folder / "X.NII.GZ")
    for name in ("._z.nii.gz", "._y.MHA", ".0123456789abcdef.part.nii.gz"):
        (folder / name).write_bytes(b"Mac OS X")
    os.mkfifo(folder / "a.mha")
    os.mkfifo(folder / "b.nii.gz")
    (folder / "c.nrrd").symlink_to(folder / "c.nrrd")
    (folder / "d.nii.gz").symlink_to(folder / "absent.nii.gz")
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(folder)  # the path of a socket is at most 107 characters long
    listener.bind("e.mhd")
    os.chdir(here)
    (folder / "f.nii.gz").mkdir()
    (folder / "g.nrrd").write_bytes(b"NRRD0004\n# " + b"c" * 2_000_000)
    save_mha(folder / "h.mha", NDims="99999")
    (folder / "i.nii").symlink_to("/dev/zero")
    entries = segment_folder(segmenter(), [folder], tmp_path / "out", ["liver"])
    listener.close()
    status = {entry["name"].split(".")[0]: entry["status"] for entry in entries}
    assert status == dict.fromkeys("abcdefghi", "failed") | dict.fromkeys(("X", "y", "z"), "done")
    for entry in entries:
        assert entry["status"] == "done" or f"/{entry['name'].split('.')[0]}." in entry["error"].replace(
            str(folder), ""
        )
    assert json.loads((tmp_path / "out" / "report.json").read_text())["studies"]


def test_a_symlink_loop_given_by_name_is_refused(tmp_path: Path) -> None:
    loop = tmp_path / "loop.nii.gz"
    loop.symlink_to(loop)
    with pytest.raises(InputError, match="symbolic link leads to no file"):
        read_volume(loop)
    assert scan_identity(loop) == {"bytes": 0, "modified_ns": 0}


def test_attribute_files_of_macos_are_no_scans_anywhere(tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        save_patient(tmp_path / kind / "ct.nii.gz", patient_hu() if kind == "images" else np.ones(SHAPE, np.uint8))
        (tmp_path / kind / "._ct.nii.gz").write_bytes(b"Mac OS X")
        (tmp_path / kind / "._ct_larynx.nii.gz").write_bytes(b"Mac OS X")
    (tmp_path / "cases.json").write_text('{"ct": {"annotated": ["brainstem"]}}')
    assert find_scans([tmp_path / "images"]) == [tmp_path / "images" / "ct.nii.gz"]
    assert len(CaseFolder(tmp_path, "openkbp")) == 1
    scores = evaluate_folder(tmp_path / "labels", tmp_path / "labels", dataset="openkbp")
    assert {score.case for score in scores} == {"ct"}
    with pytest.raises(InputError, match="macOS's attributes"):
        read_volume(tmp_path / "images" / "._ct.nii.gz")


def test_files_that_may_not_be_read_are_named(tmp_path: Path) -> None:
    path = save_patient(tmp_path / "ct.nii.gz")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    for read in (read_volume, read_label_map, read_label_table):
        with pytest.raises(InputError, match="cannot be opened: Permission denied"):
            read(path)


# -- sizes ---------------------------------------------------------------------------------------------------


def huge() -> dict[str, Callable[[Path], Path]]:
    small = np.zeros((10, 10, 10), np.int16)

    def metres(path: Path) -> Path:
        return save_patient(path, xyzt_units=1)

    return {
        "one row of 1e6": lambda path: save_patient(path, srow_x=[1e6, 0, 0, 0]),
        "one row of 1e30": lambda path: save_patient(path, srow_x=[1e30, 0, 0, 0]),
        "voxels of 1000 mm": lambda path: save_patient(
            path, small, srow_x=[1000, 0, 0, 0], srow_y=[0, 1000, 0, 0], srow_z=[0, 0, 1000, 0]
        ),
        "metres that are mm": metres,
        "mm that are metres": lambda path: save_patient(
            path, srow_x=[0.008, 0, 0, 0], srow_y=[0, 0.009, 0, 0], srow_z=[0, 0, 0.01, 0]
        ),
        "dim of 32767": lambda path: save_patient(path, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]),
        "dim in time": lambda path: save_patient(path, dim=[4, 24, 22, 20, 32767, 1, 1, 1]),
    }


@pytest.mark.parametrize("name", huge())
def test_sizes_are_refused_before_anything_is_allocated(name: str, tmp_path: Path) -> None:
    path = huge()[name](tmp_path / "ct.nii.gz")
    tracemalloc.start()
    for read in (read_volume, read_label_map):
        with pytest.raises(InputError, match=r"voxels|mm large|cannot hold") as caught:
            read(path)
        assert any(digit in str(caught.value) for digit in "123456789")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    entries = segment_folder(segmenter(), [path], tmp_path / "out", ["liver"])
    assert entries[0]["status"] == "failed"
    assert main(["info", str(path)]) == 2


@pytest.mark.parametrize(
    ("shape", "spacing"), [((62, 62, 62), 0.05), ((100, 100, 100), 1e-9), ((62, 62, 62), 1e-300), ((62, 62, 62), 0.15)]
)
def test_the_network_grid_is_estimated_first(shape: tuple[int, int, int], spacing: float) -> None:
    grid = Grid(shape, np.diag([3.9, 3.9, 3.9, 1.0]))
    with pytest.raises(InputError, match=r"the network's grid of the scan has .* GB in memory"):
        network_grid(grid, spacing=(spacing,) * 3)
    assert network_grid(grid, spacing=(1.5, 1.5, 1.5)).shape[0] > 0


def test_arrays_are_estimated_as_files_are() -> None:
    with pytest.raises(InputError, match="mm large"):
        checked = Volume(np.zeros((100, 100, 100), np.float32), np.diag([100.0, 100, 100, 1]))
        segmenter().segment(checked, ["liver"])
    assert MOST_VOXELS * 4 <= 16e9 and LONGEST_MM < 10_000


def test_streams_that_unpack_to_far_more_than_their_header_says_are_refused(tmp_path: Path) -> None:
    bomb = gzip.compress(save_patient(tmp_path / "a.nii").read_bytes() + b"\0" * (80 << 20), 1)
    (tmp_path / "ct.nii.gz").write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(InputError, match="far more than"):
        read_volume(tmp_path / "ct.nii.gz")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


# -- the label table -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"mome_labels": 5}',
        '{"mome_labels": "liver"}',
        '{"mome_labels": {"id": 1}}',
        '{"mome_labels": [5]}',
        '{"mome_labels": [{"id": "1", "name": "liver"}]}',
        '{"mome_labels": [{"id": true, "name": "liver"}]}',
        '{"mome_labels": [{"id": 1}]}',
        '{"mome_labels": [{"id": 1, "name": 2}]}',
        '{"mome_labels": ' + "[" * 100_000,
        '{"mome_labels": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"mome_labels": ' + "9" * 10_000 + "}",
        '{"mome_labels": [',
    ],
)
def test_damaged_label_tables_are_the_users_to_mend(text: str, tmp_path: Path, capsys) -> None:
    image = patient_image((patient_hu() > 0).astype(np.uint8))
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, text.encode()))
    path = tmp_path / "ct_liver.nii.gz"
    nib.save(image, path)
    with pytest.raises(InputError, match="label table in the header is damaged"):
        read_label_table(path)
    assert main(["info", str(path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) <= 3
    assert find_scans([tmp_path]) == [path]  # reading it says what is wrong


def test_other_comments_are_no_label_tables(tmp_path: Path) -> None:
    image = patient_image()
    for text in ("[" * 100_000, "a comment", '{"other": 1}', "\x00\xff"):
        image.header.extensions.append(nib.nifti1.Nifti1Extension(6, text.encode("latin-1")))
    nib.save(image, tmp_path / "ct.nii.gz")
    assert read_label_table(tmp_path / "ct.nii.gz") == []
    data = bytearray(patient_image().to_bytes())
    data[348:352] = b"\1\0\0\0"
    data[352:360] = np.array([2**31 - 1, 6], "<i4").tobytes()
    np.frombuffer(data, nib.nifti1.header_dtype, 1)  # still a header
    (tmp_path / "x.nii").write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        vox = np.array([4096], "<f4").tobytes()
        data[108:112] = vox
        (tmp_path / "x.nii").write_bytes(data + b"\0" * 4096)
        read_label_table(tmp_path / "x.nii")


def test_the_patient_itself_is_read_by_every_command(tmp_path: Path, capsys) -> None:
    assert main(["info", str(save_mha(tmp_path / "CT.MHA"))]) == 0
    assert main(["info", str(save_patient(tmp_path / "CT.NII.GZ"))]) == 0
    np.testing.assert_allclose(read_volume(tmp_path / "CT.MHA").affine, patient_affine())
    assert "note" not in capsys.readouterr().out
