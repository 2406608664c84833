"""The life of a server: what is kept, how it stops, and how it goes on after SIGKILL. No token is needed here."""

from __future__ import annotations

import gzip
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dicom_series import along_z, series, write
from dicomweb_server import archive
from server_process import Server, save_model
from small_scans import large_body, patient_bytes

for package in ("fastapi", "uvicorn", "python_multipart", "dicomweb_client", "highdicom"):
    pytest.importorskip(package, reason="the server needs mome[serve,dicom,dicomweb]")
pytestmark = [pytest.mark.wide, pytest.mark.timeout(400)]

NO_GRACE = """
import functools
import mome.server.run as run
run.serve = functools.partial(run.serve, grace_s=0.0)
"""
LATE = """
import asyncio
import uvicorn
startup = uvicorn.Server.startup
async def late(self, sockets=None):
    await asyncio.sleep(1)
    await startup(self, sockets)
uvicorn.Server.startup = late
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def ct() -> bytes:
    return gzip.compress(patient_bytes(), 1)


@pytest.fixture
def longer() -> bytes:
    return gzip.compress(patient_bytes(large_body()), 1)


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_server_stops_is_killed_and_goes_on(model: Path, tmp_path: Path, ct: bytes, longer: bytes) -> None:
    server = Server(model, tmp_path / "server", token=None, prelude=NO_GRACE)
    first, second = (server.submit([("a", data)]).json["id"] for data in (longer, ct))
    server.wait(first, ["running"])
    (worker,) = server.workers()
    assert server.stop() == 143 and gone(worker)
    assert f"job {first} returned to the queue: the server stops" in server.log.read_text()
    server.start()
    assert server.ask("GET", f"/jobs/{second}").json["state"] == "queued"
    for _ in range(2):
        server.wait(first, ["running"])
        (worker,) = server.workers()
        server.kill()
        deadline = time.monotonic() + 5
        while not gone(worker):  # the worker does not outlive the server
            assert time.monotonic() < deadline
            time.sleep(0.05)
        leftover = server.data / "uploads" / "leftover"
        leftover.mkdir()
        server.start()
        assert not leftover.exists()
    # The graceful stop did not count as an attempt; the two kills did.
    assert "the server ended 2 times while this job ran" in server.wait(first)["error"]["what"]
    assert server.wait(second)["state"] == "done"
    assert server.stop() == 143


def test_a_signal_to_all_processes_loses_no_job(model: Path, tmp_path: Path, longer: bytes) -> None:
    """systemd stops a service by SIGTERM to each of its processes."""
    server = Server(model, tmp_path / "server", token=None)
    job = server.submit([("a", longer)]).json["id"]
    server.wait(job, ["running"])
    for worker in server.workers():
        os.kill(worker, signal.SIGTERM)
    assert server.stop() == 143
    assert f"job {job} failed" not in server.log.read_text()
    server.start()
    assert server.wait(job)["state"] == "done"
    assert server.stop() == 143


def test_who_reads_the_address_in_the_log_may_connect_at_once(model: Path, tmp_path: Path) -> None:
    server = Server(model, tmp_path / "server", token=None, prelude=LATE)
    assert server.ask("GET", "/health").status == 200
    assert server.stop() == 143


def test_a_worker_that_is_killed_while_it_waits_is_replaced(model: Path, tmp_path: Path, ct: bytes) -> None:
    server = Server(model, tmp_path / "server", token=None)
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while not gone(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.wait(server.submit([("a", ct)]).json["id"])["state"] == "done"
    assert server.workers() != [worker] and "the worker ended while no job ran" in server.log.read_text()
    assert server.stop() == 143


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[Server]:
    folder = write(tmp_path / "archive", series(along_z(range(0, 36, 3)), FrameOfReferenceUID="1.2.3.9"))
    with archive(folder) as held:
        server = Server(
            model, tmp_path / "server", *("--keep", "3s", "--queue", "2", "--dicomweb", held.url), token=None
        )
        server.archive = held  # type: ignore[attr-defined]
        yield server
        assert server.stop() == 143


def test_what_is_kept_and_who_may_ask(server: Server, ct: bytes, longer: bytes, tmp_path: Path) -> None:
    job = server.run(ct)["id"]
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n' + ct + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    session = server.ask("PUT", "/session/", body, kind).json["session_id"]
    assert not (server.data / "jobs" / job / "input").exists()  # the scan goes when its job has ended
    deadline = time.monotonic() + 20
    while any(path for name in ("jobs", "images") for path in (server.data / name).iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.ask("GET", f"/jobs/{job}").status == server.ask("GET", f"/session/{session}").status == 404

    running = server.submit([("a", longer)]).json["id"]
    server.wait(running, ["running"])
    waiting = [server.submit([("b", ct)]) for _ in range(3)]
    assert [answer.status for answer in waiting] == [202, 202, 503]
    assert waiting[2].headers["retry-after"] == "5" and waiting[2].json["what"] == "the queue is full"
    assert server.ask("DELETE", f"/jobs/{running}").status == 204
    assert [server.wait(answer.json["id"])["state"] for answer in waiting[:2]] == ["done", "done"]
    assert not (server.data / "jobs" / running).exists()

    assert server.ask("GET", "/health", headers={"Host": "evil.example"}).status == 421  # DNS rebinding
    assert server.ask("GET", "/health", headers={"Host": "["}).status == 421
    assert server.ask("GET", "/health", headers={"Host": "localhost:1"}).status == 200
    assert server.ask("GET", "/auth/").json == {"enabled": False}

    held = server.archive  # type: ignore[attr-defined]
    form = b'--x\r\nContent-Disposition: form-data; name="params"\r\n\r\n{"prompts": ["liver"]}\r\n--x--\r\n'
    name = server.ask("GET", "/capabilities").json["model"]
    seg = server.ask("POST", f"/infer/{name}?image={held.series}&output=dicom_seg", form, kind)
    assert seg.status == 200 and seg.headers["content-type"] == "application/dicom", seg.body[:300]
    (tmp_path / "seg.dcm").write_bytes(seg.body)
    import pydicom

    stored = pydicom.dcmread(tmp_path / "seg.dcm")
    assert stored.Modality == "SEG" and stored.ReferencedSeriesSequence[0].SeriesInstanceUID == held.series
    refused = server.ask("POST", f"/infer/{name}?image=9.9.9", form, kind)
    assert refused.status == 422 and refused.json["what"] == "the DICOMweb server has no such series"


def test_a_temporary_folder_goes_with_its_server(model: Path, tmp_path: Path, monkeypatch, ct: bytes) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    class Temporary(Server):
        def start(self) -> None:
            self._command = [word for word in self._command if word not in ("--data", str(self.data))]
            super().start()

    server = Temporary(model, tmp_path / "server", *("--time-limit", "10s"), token=None)
    (root,) = (tmp_path / "temporary").iterdir()
    assert root.stat().st_mode & 0o777 == 0o700
    job = server.run(ct)["id"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (root / "jobs" / job).rglob("*"))
    endless = gzip.compress(patient_bytes(large_body(200)), 1)
    assert server.run(endless)["error"]["what"] == "the job took longer than 10 s"
    assert server.run(ct)["state"] == "done"
    server.kill()
    assert root.exists()
    server.start()  # it removes what the killed one has left
    assert not root.exists() and len(list((tmp_path / "temporary").iterdir())) == 1
    assert server.stop() == 143
    assert os.listdir(tmp_path / "temporary") == []
