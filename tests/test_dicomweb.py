"""`mome dicomweb`: a series is retrieved, segmented and its result stored; what is refused on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pydicom
import pytest
from dicom_series import along_z, series, write
from dicomweb_server import TOKEN, Archive, archive

from mome.cli.main import main
from mome.dicomweb.series import check_uid, find_study, list_series, retrieve_series, store_files
from mome.dicomweb.session import check_url, connect
from mome.errors import InputError, OutputError
from mome.temporary_names import temporary_folder
from mome.volumes import WRITERS

pytest.importorskip("dicomweb_client", reason="DICOMweb needs mome[dicomweb]")


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Archive]:
    monkeypatch.setenv("MOME_DICOMWEB_TOKEN", TOKEN)
    folder = write(tmp_path / "archive", series(along_z(range(0, 36, 3)), FrameOfReferenceUID="1.2.3.9"))
    with archive(folder) as held:
        yield held


def answering(status: int, kind: str = "text/plain", body: bytes = b"secret", **headers: str):
    def answer(handler: BaseHTTPRequestHandler) -> bool:
        handler.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)
        return True

    return answer


def test_a_series_is_retrieved_with_the_token(held: Archive, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    client = connect(held.url)
    assert find_study(client, held.series) == held.study
    counts: list[int] = []
    assert retrieve_series(client, held.study, held.series, tmp_path / "in", counts.append) == 12 == counts[-1]
    files = sorted((tmp_path / "in").iterdir())
    assert [path.name for path in files] == [f"{n:06d}.dcm" for n in range(12)]
    places = {pydicom.dcmread(path).ImagePositionPatient[2] for path in files}
    assert len(places) == 12
    assert {token for *_, token in held.seen} == {f"Bearer {TOKEN}"}


def test_a_redirect_to_another_host_is_refused(held: Archive, tmp_path: Path) -> None:
    with archive(write(tmp_path / "other", series(along_z(range(0, 9, 3))))) as other:
        held.answer = answering(302, Location=other.url + "/series")
        with pytest.raises(InputError, match="redirects to another server"):
            find_study(connect(held.url), held.series)
        assert other.seen == []  # in particular, no token was sent there
    held.answer = answering(302, Location="/elsewhere")  # a redirect on the same server is followed, at most thrice
    with pytest.raises(InputError, match="cannot be reached: TooManyRedirects"):
        find_study(connect(held.url), held.series)


@pytest.mark.parametrize(
    ("status", "words"), [(401, "MOME_DICOMWEB_TOKEN"), (403, "no right"), (404, "check the UIDs"), (500, "500")]
)
def test_refusals_of_the_server(held: Archive, tmp_path: Path, status: int, words: str) -> None:
    held.answer = answering(status)
    with pytest.raises(InputError, match=words) as caught:
        retrieve_series(connect(held.url), held.study, held.series, tmp_path)
    assert "secret" not in str(caught.value) and TOKEN not in str(caught.value)


def test_answers_that_are_no_series(held: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = 'multipart/related; type="application/dicom"; boundary=cut'
    client = connect(held.url)
    for answer in (
        answering(200),
        answering(200, kind, b"\r\n--cut\r\nContent-Type: application/dicom\r\n\r\nnothing\r\n--cut--"),
        answering(200, kind, b"\r\n--cut--"),
    ):
        held.answer = answer
        with pytest.raises(InputError):
            retrieve_series(client, held.study, held.series, tmp_path)
    other = pydicom.dcmread(write(tmp_path / "x", series(along_z([0]), SeriesInstanceUID="9.9")) / "001.dcm")
    other.save_as(tmp_path / "other.dcm", enforce_file_format=True)
    held.instances, held.answer = [(tmp_path / "other.dcm").read_bytes()], lambda handler: False
    with pytest.raises(InputError, match="another series"):
        retrieve_series(client, held.study, held.series, tmp_path)
    monkeypatch.setattr("mome.dicomweb.session.MOST_BYTES", 1000)
    with pytest.raises(InputError, match="sends more than"):
        retrieve_series(client, held.study, held.series, tmp_path)
    held.answer = answering(200, "application/json", b"[]")
    with pytest.raises(InputError, match="no such series"):
        find_study(client, held.series)


def test_a_part_of_a_series_is_refused(held: Archive, tmp_path: Path) -> None:
    """Before, the slices that came were segmented as if they were the scan."""
    kind = 'multipart/related; type="application/dicom"; boundary="cut"'
    part = b"\r\n--cut\r\nContent-Type: application/dicom\r\n\r\n" + held.instances[0]
    client = connect(held.url)
    for status, body, words in (
        (206, part + b"\r\n--cut--", "some images of the series only"),
        (200, part, "ends early"),
        (200, part + b"\r\n--cut", "ends early"),
        (200, b"\r\n--cut--", "no images of this series"),
    ):
        held.answer = answering(status, kind, body)
        with pytest.raises(InputError, match=words):
            retrieve_series(client, held.study, held.series, tmp_path)
    for end in (b"\r\n--cut--\r\n", b"\r\n--cut--\r\n" + b"x" * 2000):
        held.answer = answering(200, kind, part + end)
        assert retrieve_series(client, held.study, held.series, tmp_path) == 1


@pytest.mark.parametrize(
    "body", [b"null", b"5", b"[1]", b'"x"', b'[{"0020000E": []}]', b'[{"0020000E": {"Value": 5}}]']
)
def test_lists_that_are_none(held: Archive, body: bytes) -> None:
    held.answer = answering(200, "application/dicom+json", body)
    with pytest.raises(InputError, match="something else than DICOMweb"):
        list_series(connect(held.url), held.study)


def test_answers_that_are_no_list(held: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect(held.url)
    held.answer = answering(200, "application/dicom+json", b"<html>")  # it is reached, and answers
    with pytest.raises(InputError, match="something else than DICOMweb"):
        list_series(client, held.study)
    held.answer = answering(204, "application/dicom+json", b"")
    with pytest.raises(InputError, match="has no such study"):
        list_series(client, held.study)
    kind = 'multipart/related; type="application/dicom"; boundary=cut'
    damaged = held.instances[0].replace(b"\x20\x00\x0e\x00UI", b"\x20\x00\x0e\x00U\r")  # no such type of value
    part = b"\r\n--cut\r\nContent-Type: application/dicom\r\n\r\n" + damaged
    held.answer = answering(200, kind, part + b"\r\n--cut--")
    with pytest.raises(InputError, match="something else than DICOMweb"):
        retrieve_series(client, held.study, held.series, tmp_path)
    monkeypatch.setattr("mome.dicomweb.session._MOST_BYTES_AT_ONCE", 1000)
    held.answer = answering(200, "application/dicom+json", b"[" + b" " * 2000 + b"]")
    with pytest.raises(InputError, match="sends more than"):
        list_series(client, held.study)


def test_storing_is_verified(held: Archive, tmp_path: Path) -> None:
    (path,) = write(tmp_path / "result", series(along_z([0]))).iterdir()
    client = connect(held.url)
    assert store_files(client, held.study, [path]) == [str(held.stored[0].SOPInstanceUID)]
    failed = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [0x0122]}}]}}
    held.answer = answering(202, "application/dicom+json", json.dumps(failed).encode())
    with pytest.raises(OutputError, match="0x0122"):
        store_files(client, held.study, [path])
    # All of these said that nothing was wrong, or not what was.
    for status, kind in (
        (200, "application/dicom+json; charset=utf-8"),
        (202, "application/json;charset=UTF-8"),
        (409, "application/dicom+json"),
    ):
        held.answer = answering(status, kind, json.dumps(failed).encode())
        with pytest.raises(OutputError, match=r"0x0122(.|\n)*kind=binary"):
            store_files(client, held.study, [path])
    held.answer = answering(409, "text/plain", b"secret")
    with pytest.raises(OutputError, match="has not stored the result\n"):
        store_files(client, held.study, [path])
    for kind, body in (("text/html", b"<html>Log in</html>"), ("application/dicom+xml", b"no XML")):
        held.answer = answering(200, kind, body)
        with pytest.raises(InputError, match="something else than DICOMweb"):
            store_files(client, held.study, [path])
    held.answer = answering(202, "application/dicom+json", b"")
    with pytest.raises(OutputError, match="has not stored"):
        store_files(client, held.study, [path])
    held.answer = answering(200, "application/dicom+json", b"")  # some archives answer with the status alone
    store_files(client, held.study, [path])


def test_urls_and_uids_that_are_refused() -> None:
    for url, words in (
        ("http://pacs.example/dicom-web", "can be read by anybody"),
        ("https://user:pass@pacs.example/", "a password"),
        ("ftp://pacs.example", "no URL"),
        ("pacs.example", "no URL"),
        ("https://pacs.example:x/", "no URL"),
    ):
        with pytest.raises(InputError, match=words):
            check_url(url)
    check_url("http://pacs.example/dicom-web", insecure=True)
    check_url("http://[::1]:8042/dicom-web")
    for uid in ("1.2/../3", "", "1.2.", "1" * 65):
        with pytest.raises(InputError, match="is no UID"):
            check_uid(uid, "--series")


def test_the_command_lists_series(held: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dicomweb", held.url, "--study", held.study]) == 0
    assert capsys.readouterr().out == f"{held.series}  CT  12 images  Neck \\x1b[31m 2.0\n"
    assert main(["dicomweb", held.url, "--study", held.study, "--series", held.series, "-p", "liver"]) == 2
    assert "--store, or -o FOLDER" in capsys.readouterr().err
    for more in (["-p", "liver"], ["--store"], ["-o", "out"]):  # a script would take a list for a success
        assert main(["dicomweb", held.url, "--study", held.study, *more]) == 2
        assert "no series was given" in capsys.readouterr().err


@pytest.mark.skipif("dicom_seg" not in WRITERS.names(), reason="there is no DICOM writer")
def test_the_command_stores_a_segmentation(held: Archive, tmp_path: Path, one_thread: None) -> None:
    from server_process import save_model

    model = save_model(tmp_path / "model")
    arguments = ["dicomweb", held.url, "--study", held.study, "--series", held.series, "-m", str(model)]
    assert main([*arguments, "-p", "liver", "-p", "spleen", "--store", "-o", str(tmp_path / "out")]) == 0
    (stored,) = held.stored
    assert stored.Modality == "SEG" and str(stored.StudyInstanceUID) == held.study
    (referenced,) = stored.ReferencedSeriesSequence
    assert str(referenced.SeriesInstanceUID) == held.series
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".dcm"]
    assert main([*arguments, "-p", "liver", "--store", "--writer", "nifti"]) == 2


@pytest.mark.skipif("dicom_seg" not in WRITERS.names(), reason="there is no DICOM writer")
def test_what_nothing_can_refer_to_is_refused_before_the_network_runs(
    held: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from server_process import save_model

    from mome.inference import Segmenter

    twins = series(along_z(range(0, 36, 3)), FrameOfReferenceUID="1.2.3.9", SOPInstanceUID="1.2.7")
    held.instances = [path.read_bytes() for path in write(tmp_path / "twins", twins).iterdir()]
    monkeypatch.setattr(Segmenter, "segment", lambda *a, **k: pytest.fail("the network ran"))
    arguments = ["dicomweb", held.url, "--study", held.study, "--series", held.series, "--store", "-p", "liver"]
    assert main([*arguments, "-m", str(save_model(tmp_path / "model"))]) == 2
    assert "have no SOPInstanceUID, or share one" in capsys.readouterr().err and not held.stored


@pytest.mark.skipif("dicom_seg" not in WRITERS.names(), reason="there is no DICOM writer")
@pytest.mark.parametrize(("prompt", "model"), [("hepar", "mome-ct-torso-tiny"), ("mandible", "mome-ct-tiny")])
def test_without_a_model_the_prompts_choose_it(
    held: Archive, capsys: pytest.CaptureFixture[str], one_thread: None, prompt: str, model: str
) -> None:
    assert main(["dicomweb", held.url, "--study", held.study, "--series", held.series, "-p", prompt, "--store"]) == 0
    (stored,) = held.stored
    algorithm = stored.SegmentSequence[-1].SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmName == f"mome {model}"
    printed = " ".join(capsys.readouterr().err.split())
    assert ("the model is mome-ct-torso-tiny, which was trained on liver" in printed) == (prompt == "hepar")
    assert "not trained on" not in printed


def test_prompts_of_two_models_are_refused_before_anything_is_retrieved(
    held: Archive, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["dicomweb", held.url, "--study", held.study, "--series", held.series, "--store"]
    assert main([*arguments, "-p", "liver", "-p", "mandible"]) == 2
    assert "no bundled model knows both 'mandible' and 'liver'" in capsys.readouterr().err and held.seen == []


def test_a_series_of_a_killed_command_is_removed_by_the_next_one(
    held: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    foreign = temporary / ".0123456789abcdef.part"  # the folder belongs to other programs, too
    foreign.write_text("not ours")
    script = """
import os, signal, sys
import mome.dicomweb.series as series
from mome.cli.main import main
def killed(client, study, uid, folder):
    (folder / "000000.dcm").write_text("a patient")
    os.kill(os.getpid(), signal.SIGKILL)
series.retrieve_series = killed
main(sys.argv[1:])
"""
    arguments = ["dicomweb", held.url, "--study", held.study, "--series", held.series, "-p", "mandible", "--store"]
    command = [sys.executable, "-c", script, *arguments]
    subprocess.run(command, env={**os.environ, "TMPDIR": str(temporary)}, stderr=subprocess.DEVNULL)
    assert [path.read_text() for path in temporary.rglob("*.dcm")] == ["a patient"]
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with temporary_folder() as folder:
        assert set(temporary.glob(".*.part")) == {foreign, folder} and folder.stat().st_mode & 0o777 == 0o700
    assert set(temporary.glob(".*.part")) == {foreign} and not [*temporary.rglob("*.dcm")]
