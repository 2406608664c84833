"""ZIP archives of scans: what is read, what is refused, and that nothing is left behind or written elsewhere."""

from __future__ import annotations

import gzip
import os
import resource
import signal
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_scans import mha_text, patient_bytes, patient_hu
from stand_in_models import Threshold

from mome.cli.main import main
from mome.errors import InputError, OutputError
from mome.inference import Segmenter, segment_folder
from mome.inference.loaded_scan import load_scan
from mome.processing import MoMEProcessor
from mome.volumes import archive_members, archives
from mome.volumes.archives import unpacked
from mome.volumes.dicom import DicomOptions

SCAN = gzip.compress(patient_bytes(), 1)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own folder for temporary files, in which nothing may be left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def segmenter() -> Segmenter:
    return Segmenter(Threshold(0.4), MoMEProcessor(spacing=[8, 9, 10], hu_window=[-200, 800]))


def packed(path: Path, members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def refused(archive: Path, words: str) -> InputError:
    with pytest.raises(InputError, match=words) as caught, unpacked(archive):
        pass
    assert str(archive) in str(caught.value) and len(str(caught.value).splitlines()) <= 3
    return caught.value


# -- what is read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ct.nii.gz", "a/b c/ct.NII.GZ", "ü/ct.nii.gz"])
def test_a_zip_of_one_scan(tmp_path: Path, name: str) -> None:
    beside = {"__MACOSX/._ct.nii.gz": b"Mac OS X", ".hidden.nii.gz": b"x", "notes.txt": b"notes", "empty/": b""}
    archive = packed(tmp_path / "study.zip", {**beside, name: SCAN}, zipfile.ZIP_DEFLATED)
    result = segmenter().segment(archive, ["liver"])
    assert result.source == archive and not any("ZIP" in note for note in result.notes)
    (tmp_path / "ct.nii.gz").write_bytes(SCAN)
    alone = segmenter().segment(tmp_path / "ct.nii.gz", ["liver"])
    np.testing.assert_array_equal(result.masks["liver"], alone.masks["liver"])
    assert result.masks["liver"].any()


def test_a_zip_in_a_folder_run(tmp_path: Path) -> None:
    scans, out = tmp_path / "in", tmp_path / "out"
    scans.mkdir()
    packed(scans / "one.zip", {"ct.nii.gz": SCAN, "more.zip": b"PK\x03\x04"})
    packed(scans / "two.zip", {"ct.nii.gz": b"damaged"})
    (scans / "three.nii.gz").write_bytes(SCAN)
    entries = {entry["name"]: entry for entry in segment_folder(segmenter(), [scans], out, ["liver"])}
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "one": "done",
        "two": "failed",
        "three": "done",
    }
    assert "left out of the ZIP archive: 1 archive" in entries["one"]["notes"]
    assert str(scans / "two.zip") in entries["two"]["error"] and ".part" not in entries["two"]["error"]
    assert (out / "one_liver.nii.gz").read_bytes() == (out / "three_liver.nii.gz").read_bytes()
    assert not list(out.glob(".*"))
    again = segment_folder(segmenter(), [scans / "one.zip"], out, ["liver"], resume=True)
    assert again[0]["skipped"]


def test_a_zip_of_dicom_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pydicom")
    from dicom_series import along_z, series, write

    first = write(tmp_path / "s1", series(along_z(np.arange(8) * 3.0), SeriesNumber=1, SeriesInstanceUID="1.2.1"), "")
    second = write(tmp_path / "s2", series(along_z(np.arange(6) * 3.0), SeriesNumber=2, SeriesInstanceUID="1.2.2"))
    members = {f"DICOM/a/{path.name}": path.read_bytes() for path in first.iterdir()}
    members |= {f"DICOM/b/{path.name}": path.read_bytes() for path in second.iterdir()}
    viewer = {"DICOMDIR": b"\0" * 128 + b"DICM", "viewer/start": b"\x7fELF\0\1", "viewer/a.jar": b"PK\x03\x04"}
    archive = packed(tmp_path / "study.zip", members | viewer)
    assert main(["info", str(archive)]) == 0
    printed = capsys.readouterr().out
    assert "series 1  CT, 8 images" in printed and "series 2  CT, 6 images" in printed and "damaged" not in printed
    processor = segmenter().processor
    with pytest.raises(InputError, match="2 DICOM series") as caught:
        load_scan(archive, processor)
    assert str(archive) in str(caught.value)
    assert load_scan(archive, processor, dicom=DicomOptions(series=2)).volume.shape[2] == 6
    largest = load_scan(archive, processor, dicom=DicomOptions(series="largest")).volume
    assert largest.shape[2] == 8 and any("series 1, the largest CT, is read" in note for note in largest.notes)


@pytest.mark.parametrize("writer", ["dicom_seg", "rtstruct"])
def test_masks_of_a_zip_are_written_as_dicom(tmp_path: Path, writer: str) -> None:
    pydicom, _ = pytest.importorskip("pydicom"), pytest.importorskip("highdicom")
    from dicom_series import along_z, series, write

    def zipped(name: str, series_uid: str) -> Path:
        made = series(along_z(np.arange(8) * 3.0), SeriesInstanceUID=series_uid, FrameOfReferenceUID="1.2.3.9")
        folder = write(tmp_path / name, made)
        return packed(tmp_path / "study.zip", {f"a/{path.name}": path.read_bytes() for path in folder.iterdir()})

    archive = zipped("first", "1.2.1")
    result = segmenter().segment(archive, ["liver"])
    before = set(os.listdir(tempfile.gettempdir()))
    (path,) = result.save(tmp_path / "out", "study", writer=writer)
    assert set(os.listdir(tempfile.gettempdir())) <= before  # what was unpacked again is gone
    text = str(pydicom.dcmread(path))
    uids = {str(pydicom.dcmread(slice_file).SOPInstanceUID) for slice_file in (tmp_path / "first").iterdir()}
    assert len(uids) == 8 and any(uid in text for uid in uids)
    zipped("second", "1.2.2")
    with pytest.raises(InputError, match="has changed or is gone") as caught:
        result.save(tmp_path / "other", "study", writer=writer)
    assert caught.value.where == str(archive) and not list((tmp_path / "other").glob("*"))


# -- what is refused -----------------------------------------------------------------------------------------


def with_flag(path: Path, bit: int) -> Path:
    """Sets a bit of the general purpose flag in both headers of the only member."""
    data = bytearray(packed(path, {"ct.nii.gz": SCAN}).read_bytes())
    for start, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.index(start) + at
        data[place : place + 2] = struct.pack("<H", struct.unpack_from("<H", data, place)[0] | bit)
    path.write_bytes(bytes(data))
    return path


def overlapping(path: Path) -> Path:
    """Two entries of the directory stand for the same compressed bytes, of which each is nearly the whole file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", os.urandom(50_000))
        info = zipfile.ZipInfo("b.dcm")
        first = archive.infolist()[0]
        for name in ("header_offset", "CRC", "compress_size", "file_size", "compress_type"):
            setattr(info, name, getattr(first, name))
        archive.filelist.append(info)
        archive.NameToInfo[info.filename] = info
    return path


def lying(path: Path, size: int) -> Path:
    """The directory names another size than the member has."""
    data = bytearray(packed(path, {"ct.nii": patient_bytes()}, zipfile.ZIP_DEFLATED).read_bytes())
    place = data.index(b"PK\x01\x02") + 24
    data[place : place + 4] = struct.pack("<I", size)
    path.write_bytes(bytes(data))
    return path


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "parent": (lambda path: packed(path, {"../ct.nii.gz": SCAN}), "member 1 leads out"),
    "parent inside": (lambda path: packed(path, {"a/../../ct.nii.gz": SCAN}), "leads out"),
    "backslashes": (lambda path: packed(path, {"..\\ct.nii.gz": SCAN}), "leads out"),
    "absolute": (lambda path: packed(path, {"/etc/ct.nii.gz": SCAN}), "leads out"),
    "drive": (lambda path: packed(path, {"C:/ct.nii.gz": SCAN}), "leads out"),
    "bomb": (lambda path: packed(path, {"ct.nii": bytes(80 << 20)}, zipfile.ZIP_DEFLATED), "times as large"),
    "overlapping": (overlapping, "overlap"),
    "says less": (lambda path: lying(path, 1000), "damaged"),
    "says more": (lambda path: lying(path, 50_000_000), "damaged"),
    "encrypted": (lambda path: with_flag(path, 1), "encrypted"),
    "bzip2": (lambda path: packed(path, {"ct.nii": patient_bytes()}, zipfile.ZIP_BZIP2), "method 12"),
    "two scans": (lambda path: packed(path, {"a.nii.gz": SCAN, "b.nii.gz": SCAN}), "2 files that are scans"),
    "archives only": (lambda path: packed(path, {"a.zip": b"PK\x03\x04", "b.tar.gz": b"\x1f\x8b"}), "holds archives"),
    "detached": (lambda path: packed(path, {"ct.mhd": mha_text().encode(), "ct.raw": b"x"}), "in another file"),
    "no scan": (lambda path: packed(path, {"notes.txt": b"notes"}), "holds no scan"),
    "empty": (lambda path: packed(path, {}), "holds no scan"),
    "no archive": (lambda path: (path.write_bytes(b"PK\x03\x04 or not"), path)[1], "no ZIP archive"),
    "zeros": (lambda path: (path.write_bytes(b""), path)[1], "no ZIP archive"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_archives_that_are_refused(tmp_path: Path, name: str) -> None:
    make, words = HOSTILE[name]
    archive = make(tmp_path / "study.zip")
    before = sorted(tmp_path.rglob("*"))
    refused(archive, words)
    assert sorted(tmp_path.rglob("*")) == before
    (entry,) = segment_folder(segmenter(), [archive], tmp_path / "out", ["liver"])
    assert entry["status"] == "failed" and str(archive) in entry["error"] and not list((tmp_path / "out").glob("*"))


def test_a_truncated_archive_and_a_damaged_member(tmp_path: Path) -> None:
    whole = packed(tmp_path / "study.zip", {"ct.nii": patient_bytes()}, zipfile.ZIP_DEFLATED)
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) // 2])
    refused(whole, "no ZIP archive, or it is truncated")
    middle = len(data) // 2
    whole.write_bytes(data[:middle] + bytes(64) + data[middle + 64 :])
    refused(whole, "member 1 cannot be read")


def test_links_are_left_out(tmp_path: Path) -> None:
    archive = tmp_path / "study.zip"
    with zipfile.ZipFile(archive, "w") as made:
        link = zipfile.ZipInfo("ct.nii.gz")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        made.writestr(link, "/etc/passwd")
        made.writestr("scan.nii.gz", SCAN)
    with unpacked(archive) as inner:
        assert inner.path.read_bytes() == SCAN and inner.path.name == "00002.nii.gz"
        assert inner.notes == ("left out of the ZIP archive: 1 symbolic link",)


def test_limits_of_members_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = packed(tmp_path / "study.zip", {f"{number}.dcm": SCAN for number in range(5)})
    monkeypatch.setattr(archive_members, "MOST_MEMBERS", 4)
    refused(archive, "5 members; the limit is 4")
    monkeypatch.undo()
    monkeypatch.setattr(archive_members, "MOST_BYTES", 4 * len(SCAN))
    refused(archive, "the limit is")
    monkeypatch.undo()
    monkeypatch.setattr(archive_members, "_LARGEST_DIRECTORY", 100)
    refused(archive, "the directory of the archive has")
    monkeypatch.undo()
    monkeypatch.setattr(archives, "_free_bytes", lambda folder: 2 * len(SCAN))
    assert "free some disk space" in str(refused(archive, "and the disk has"))


def test_a_full_disk_while_unpacking(tmp_path: Path) -> None:
    """Files of this process may have 2 kB at most, so that the scan cannot be unpacked."""
    archive, out = packed(tmp_path / "study.zip", {"ct.nii.gz": SCAN}), tmp_path / "out"
    made = segmenter()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OutputError, match="the unpacked archive could not be written: File too large"):
            segment_folder(made, [archive], out, ["liver"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(out.iterdir())


def test_what_a_killed_process_unpacked_is_removed(tmp_path: Path, temporary: Path) -> None:
    left = temporary / ".0123456701234567012345670123abcd.part"
    left.mkdir()
    foreign = temporary / ".0123456789abcdef.part"  # may be another program's
    foreign.mkdir()
    name = archives.temporary_path(temporary / "scan").name
    dead = temporary / (name[:9] + "7fffffff" + "00000001" + name[25:])
    dead.mkdir()
    (dead / "00001.dcm").write_bytes(b"x")
    with unpacked(packed(tmp_path / "study.zip", {"ct.nii.gz": SCAN})):
        assert not dead.exists() and foreign.exists() and left.exists()
    left.rmdir(), foreign.rmdir()


def test_slices_of_the_patient_are_readable_by_the_user_alone(tmp_path: Path) -> None:
    with unpacked(packed(tmp_path / "s.zip", {"ct.nii.gz": SCAN}), tmp_path / "new" / "out") as inner:
        assert inner.path.parent.stat().st_mode & 0o077 == 0 and inner.path.parent.parent == tmp_path / "new" / "out"
    assert not list((tmp_path / "new" / "out").iterdir()) and patient_hu().any()


@pytest.mark.parametrize("comment", [0, 65_535])
@pytest.mark.parametrize("decoy", [False, True])
def test_a_zip64_record_does_not_hide_a_large_directory(
    tmp_path: Path, comment: int, decoy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`zipfile` reads the directory that the ZIP64 record names, also where the end names a small one."""
    path = packed(tmp_path / "study.zip", {"ct.nii.gz": SCAN, **{f"{n}.txt": b"" for n in range(20)}})
    data = path.read_bytes()
    at = data.rindex(b"PK\x05\x06")
    count, _, size, first = struct.unpack_from("<HHII", data, at + 8)
    # The size of the record is not checked by zipfile, so it can hold the signature of another one.
    length = int.from_bytes(b"PK\x06\x06", "little") if decoy else 44
    record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", length, 45, 45, 0, 0, count, count, size, first)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, at, 1)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, 40, first, comment)
    path.write_bytes(data[:at] + record + locator + end + b"x" * comment)
    with zipfile.ZipFile(path) as opened:
        assert len(opened.infolist()) == 21
    with unpacked(path, tmp_path) as inner:
        assert inner.path.is_file()
    monkeypatch.setattr(archive_members, "_LARGEST_DIRECTORY", size - 1)
    with pytest.raises(InputError, match="the directory of the archive has"), unpacked(path, tmp_path):
        pass
