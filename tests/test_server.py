"""`mome serve`: upload, queue, results, and what it refuses."""

from __future__ import annotations

import gzip
import io
import json
import socket
import time
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_series import along_z, series, write
from server_process import PATIENT, TOKEN, Server, form
from small_scans import large_body, patient_bytes, patient_hu, save_mha, save_nrrd

pytest.importorskip("fastapi", reason="the server needs mome[serve]")
pytest.importorskip("uvicorn", reason="the server needs mome[serve]")
pytest.importorskip("python_multipart", reason="the server needs mome[serve]")


@pytest.fixture(scope="module")
def model(server: Server) -> Path:
    return server.folder.parent / "model"


def test_a_wrong_token_gets_401_and_learns_nothing(server: Server, ct: bytes) -> None:
    job = server.run(ct)["id"]
    asked = [
        ("GET", f"/jobs/{job}"),
        ("GET", "/jobs/6f0d3b1e-0000-4000-8000-000000000000"),
        ("DELETE", f"/jobs/{job}"),
        ("GET", f"/jobs/{job}/result"),
        ("GET", "/metrics"),
        ("GET", "/capabilities"),
        ("GET", "/openapi.json"),
        ("GET", "/no-such-route"),
        ("GET", "/page/../jobs"),
        ("POST", "/jobs"),
        ("POST", "/infer/model"),
        ("GET", "/info/"),
    ]
    answers = [server.ask(*what, token=token) for what in asked for token in (None, "wrong", TOKEN[:-1], TOKEN + "0")]
    assert {answer.status for answer in answers} == {401}
    assert len({answer.body for answer in answers}) == 1
    assert len({str(sorted(set(answer.headers) - {"date"})) for answer in answers}) == 1
    assert server.ask("GET", "/health", token=None).json == {"status": "ok"}
    assert server.ask("GET", f"/jobs/{job}").json["state"] == "done"
    basic = server.ask("GET", "/metrics", headers={"Authorization": f"Basic {TOKEN}"})
    assert basic.status == 401


def test_a_wrong_token_is_refused_before_the_upload(server: Server) -> None:
    connection = server.connection(timeout=10)
    connection.putrequest("POST", "/jobs")
    connection.putheader("Authorization", "Bearer wrong")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", "2500000")
    connection.endheaders()
    assert connection.getresponse().status == 401  # nothing of the body was sent
    connection.close()
    assert not list((server.data / "uploads").iterdir())


def test_masks_are_those_of_the_segmenter(
    server: Server, model: Path, ct: bytes, tmp_path: Path, one_thread: None
) -> None:
    from mome import Segmenter

    (tmp_path / "ct.nii.gz").write_bytes(ct)
    expected = Segmenter(model).segment(tmp_path / "ct.nii.gz", ["liver", "spleen"])
    assert all(expected.masks.voxels.values())
    job = server.run(ct, ["liver", "spleen"], output=["nifti", "multilabel", "image", "nrrd"])
    assert job["state"] == "done", job
    assert [s["volume_ml"] for s in job["result"]["structures"]] == [s["volume_ml"] for s in expected.summary()]
    formats = job["result"]["formats"]
    archive = server.ask("GET", f"/jobs/{job['id']}/result?format=nifti")
    assert archive.headers["content-type"] == "application/zip" and len(archive.body) == formats["nifti"]
    with zipfile.ZipFile(io.BytesIO(archive.body)) as opened:
        assert opened.namelist() == ["scan_liver.nii.gz", "scan_spleen.nii.gz"]
        for name in ("liver", "spleen"):
            mask = nib.Nifti1Image.from_bytes(gzip.decompress(opened.read(f"scan_{name}.nii.gz")))
            assert np.array_equal(np.asarray(mask.dataobj), expected.masks[name])
            assert np.allclose(mask.affine, expected.grid.affine)
    image = nib.Nifti1Image.from_bytes(
        gzip.decompress(server.ask("GET", f"/jobs/{job['id']}/result?format=image").body)
    )
    assert np.array_equal(np.asarray(image.dataobj), patient_hu())
    summary = server.ask("GET", f"/jobs/{job['id']}/result?format=json").json
    assert summary["structures"] == job["result"]["structures"]
    expected.label_map()
    assert summary["structures"] == expected.summary() and "volume_ml_in_map" in summary["structures"][0]
    assert summary["overlapping_voxels"] == expected.overlapping_voxels
    whole = server.ask("GET", f"/jobs/{job['id']}/result?format=multilabel").body
    part = server.ask("GET", f"/jobs/{job['id']}/result?format=multilabel", headers={"Range": "bytes=5-20"})
    assert part.status == 206 and part.body == whole[5:21]
    _check_nrrd(server.ask("GET", f"/jobs/{job['id']}/result?format=nrrd").body, expected, tmp_path)


def _check_nrrd(data: bytes, expected, tmp_path: Path) -> None:
    from mome.volumes import read_label_map

    (tmp_path / "map.nrrd").write_bytes(data)
    volume = read_label_map(tmp_path / "map.nrrd")
    assert np.allclose(volume.affine, expected.grid.affine)
    inside = {name: expected.masks[name].astype(bool) for name in ("liver", "spleen")}
    only_spleen = inside["spleen"] & ~inside["liver"]
    only_liver = inside["liver"] & ~inside["spleen"]
    assert (volume.array[only_liver] == 1).all() and (volume.array[only_spleen] == 2).all()
    assert (volume.array[~inside["liver"] & ~inside["spleen"]] == 0).all()


def test_other_formats_of_scans(server: Server, tmp_path: Path) -> None:
    dicom = [path.read_bytes() for path in sorted(_series(tmp_path).iterdir())]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for number, data in enumerate(dicom):
            opened.writestr(f"{PATIENT}/{number}.dcm", data)
    uploads = {
        "nrrd": [("x", save_nrrd(tmp_path / "a.nrrd").read_bytes())],
        "mha": [("x", save_mha(tmp_path / "a.mha").read_bytes())],
        "nii": [("x", patient_bytes())],
        "dicom": [(f"../{PATIENT}{n}.dcm", data) for n, data in enumerate(dicom)],
        "zip": [(f"{PATIENT}.zip", archive.getvalue())],
    }
    for kind, files in uploads.items():
        answer = server.submit(files, ["liver"])
        assert answer.status == 202, (kind, answer.body)
        job = server.wait(answer.json["id"])
        assert job["state"] == "done", (kind, job)


def _series(folder: Path) -> Path:
    slices = series(along_z(range(0, 36, 3)), PatientName=PATIENT, PatientID="4711-Eisenbart")
    return write(folder / "series", slices)


def test_nothing_of_a_patient_is_in_names_or_the_log(server: Server, tmp_path: Path) -> None:
    secret = "Zwiebelfisch"
    dicom = [path.read_bytes() for path in sorted(_series(tmp_path).iterdir())]
    files = [(f"{PATIENT}_{n}.dcm", data) for n, data in enumerate(dicom)]
    jobs = [server.submit(files, ["liver"]).json["id"]]
    server.submit(files, ["liver", f"left {secret}"])
    server.submit([(f"{secret}.nii.gz", b"no scan")], ["liver"])
    server.ask("GET", f"/jobs/{secret}?name={secret}", headers={"X-Patient": secret, "User-Agent": secret})
    server.ask("GET", f"/{secret}")
    broken = gzip.compress(patient_bytes(descrip=secret.encode(), dim=[3, 24, 22, 9999, 1, 1, 1, 1]))
    jobs.append(server.submit([(f"{secret}.nii.gz", broken)], ["liver"]).json["id"])
    ends = [server.wait(job) for job in jobs]
    assert [end["state"] for end in ends] == ["done", "failed"]
    assert str(server.folder) not in json.dumps(ends)
    log = server.log.read_text()
    names = " ".join(str(path) for path in server.data.rglob("*"))
    for word in (secret, "Eisenbart", "Quirinus"):
        assert word not in log and word not in names
    for job in jobs:
        assert job in log
        assert server.ask("DELETE", f"/jobs/{job}").status == 204
        assert server.ask("GET", f"/jobs/{job}").status == 404
        assert job not in " ".join(str(path) for path in server.data.rglob("*"))
    for path in server.data.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"Eisenbart" not in content and secret.encode() not in content, path


def test_a_request_that_cannot_be_served_is_refused_in_words(server: Server, ct: bytes) -> None:
    files = [("ct.nii.gz", ct)]
    cases = [
        (server.submit(files, []), 422, "no prompt was given"),
        (server.submit(files, ["left thingy"]), 422, "which is not understood"),
        (server.submit(files, ["liver"], output="dicom_sag"), 422, "there is no format"),
        (server.submit(files, ["liver"], promt="liver"), 422, "did you mean 'prompt'?"),
        (server.submit(files, ["liver"], frame="-1"), 422, "frame is a whole number"),
        (server.submit(files, ["liver"], allow_gaps="maybe"), 422, "true or false"),
        (server.submit(files, ["x" * 501]), 422, "more than 500 characters"),
        (server.submit([], ["liver"]), 422, "no file was uploaded"),
        (server.submit([("a", b"")], ["liver"]), 422, "the file is empty"),
        (server.submit([("a", b"hello")], ["liver"]), 422, "no scan that can be read"),
        (server.submit([("a", ct), ("b", ct)], ["liver"]), 422, "no DICOM series"),
        (server.ask("POST", "/jobs", b"{}", {"Content-Type": "application/json"}), 415, "multipart/form-data"),
        (server.ask("GET", "/nowhere"), 404, "Not Found"),
        (server.ask("GET", "/jobs/x"), 404, "there is no such job"),
        (server.ask("GET", "/jobs/..%2f..%2fjobs.sqlite3"), 404, "Not Found"),
    ]
    for answer, status, words in cases:
        assert answer.status == status and words in answer.json["what"], answer.body
        assert set(answer.json) == {"what", "where", "hint"}
    assert not list((server.data / "uploads").iterdir())


def test_malformed_forms_leave_nothing_behind(server: Server, ct: bytes) -> None:
    body, kind = form([("prompt", "liver")], [("file", "ct", ct)])
    for wrong in (
        body[:-60],
        body[: len(body) // 2],
        b"",
        b"garbage\r\n" * 9,
        body.replace(b"Content-Disp", b"\0\0", 1),
    ):
        answer = server.ask("POST", "/jobs", wrong, {"Content-Type": kind})
        assert answer.status in (400, 422), answer.body
    assert not list((server.data / "uploads").iterdir())


def test_sizes_are_limited_while_the_upload_comes(server: Server) -> None:
    body, kind = form([("prompt", "liver")], [("file", "ct", b"\0" * 4_000_000)])
    assert server.ask("POST", "/jobs", body, {"Content-Type": kind}).status == 413
    chunks = (body[at : at + 100_000] for at in range(0, len(body), 100_000))
    answer = server.ask("POST", "/jobs", chunks, {"Content-Type": kind})  # chunked: no length is declared
    assert answer.status == 413 and "larger than 3 MB" in answer.json["what"]
    field, kind = form([("prompt", "x" * 70_000)], [("file", "ct", b"")])
    assert "more than 65536 bytes" in server.ask("POST", "/jobs", field, {"Content-Type": kind}).json["what"]
    assert not list((server.data / "uploads").iterdir())


def test_archives_that_mean_harm_fail_their_jobs(server: Server) -> None:
    for name, content, words in (
        ("a.dcm", b"\0" * 100_000_000, "as a zip bomb is"),
        (f"../../{PATIENT}.dcm", bytes(128) + b"DICM", "leads out of the archive"),
        ("a.txt", b"hello", "holds no scan"),
    ):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
            opened.writestr(name, content)
        job = server.wait(server.submit([("x.zip", archive.getvalue())]).json["id"])
        assert job["state"] == "failed" and words in job["error"]["what"], job
        assert str(server.folder) not in str(job)
        assert not list((server.data / "jobs" / job["id"]).rglob("*"))


def test_slow_clients_are_cut_off(server: Server, ct: bytes) -> None:
    headers = f"POST /jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
    body = "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000\r\n\r\n--x\r\n"
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), 10) as slow_headers:
        with socket.create_connection(("127.0.0.1", server.port), 10) as slow_body:
            slow_body.sendall((headers + body).encode())
            for byte in b"GET /health HTTP/1.1\r\nX: aaaaaaaa":  # a byte now and then keeps no connection open
                try:
                    slow_headers.sendall(bytes([byte]))
                except OSError:
                    break
                time.sleep(0.05)
            try:
                assert slow_headers.recv(100) == b""
            except ConnectionResetError:
                pass
            assert b" 408 " in slow_body.recv(1000)
    assert time.monotonic() - began < 8
    assert not list((server.data / "uploads").iterdir())


def test_events_and_cancel(server: Server, ct: bytes) -> None:
    large = gzip.compress(patient_bytes(large_body()), 1)
    running = server.submit([("a", large)]).json["id"]
    waiting = server.submit([("b", ct)]).json["id"]
    assert server.wait(running, ["running"])
    assert server.ask("POST", f"/jobs/{waiting}/cancel").json["state"] == "cancelled"
    connection = server.connection()
    connection.request("GET", f"/jobs/{running}/events", headers={"Authorization": f"Bearer {TOKEN}"})
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    while (line := json.loads(answer.readline()))["progress"] is None or not line["progress"]["done"]:
        pass
    assert server.ask("GET", "/health").status == 200
    server.ask("POST", f"/jobs/{running}/cancel")
    lines = [json.loads(line) for line in answer]
    assert lines[-1]["state"] == "cancelled" and lines[-1]["finished"]
    assert server.ask("GET", f"/jobs/{running}/result").status == 409
    for job in (running, waiting):
        assert not list((server.data / "jobs" / job).rglob("*.nii.gz"))
    assert server.run(ct)["state"] == "done"


@pytest.mark.wide
def test_a_crash_of_the_worker_fails_one_job(server: Server, ct: bytes) -> None:
    import os
    import signal

    large = gzip.compress(patient_bytes(large_body()), 1)
    crashing, after = server.submit([("a", large)]).json["id"], server.submit([("b", ct)]).json["id"]
    server.wait(crashing, ["running"])
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    assert "the worker was killed while this job ran" in server.wait(crashing)["error"]["what"]
    assert server.wait(after)["state"] == "done"
    assert "mome_worker_restarts_total 1" in server.ask("GET", "/metrics").body.decode()


def test_what_the_server_says_of_itself(server: Server) -> None:
    able = server.ask("GET", "/capabilities").json
    assert able["labels"] == ["liver", "spleen"] and able["trained_labels"] == ["liver"]
    assert {"nifti", "multilabel", "json"} <= set(able["formats"])
    paths = server.ask("GET", "/openapi.json").json["paths"]
    assert {"/jobs", "/jobs/{job_id}/result", "/jobs/{job_id}/events", "/jobs/{job_id}/cancel"} <= set(paths)
    assert "prompt" in str(paths["/jobs"]["post"]["requestBody"])
    metrics = server.ask("GET", "/metrics").body.decode()
    assert 'mome_jobs{state="queued"} 0' in metrics and "mome_process_open_descriptors" in metrics
    assert server.ask("GET", "/capabilities").headers["cache-control"] == "no-store"


def test_another_origin_may_change_nothing(server: Server, ct: bytes) -> None:
    body, kind = form([("prompt", "liver")], [("file", "ct", ct)])
    headers = {"Content-Type": kind, "Origin": "https://evil.example"}
    assert server.ask("POST", "/jobs", body, headers).status == 403
    for origin in ("null", "http://[", f"http://127.0.0.1:{server.port}.evil.example"):
        assert server.ask("POST", "/jobs", body, {**headers, "Origin": origin}).status == 403
    headers["Origin"] = f"http://127.0.0.1:{server.port}"
    assert server.ask("POST", "/jobs", body, headers).status == 202
