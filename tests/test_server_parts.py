"""Parts of the server without a worker: settings, token, folder, queue in SQLite, kinds of scans."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mome.cli.main import main
from mome.errors import InputError
from mome.loopback import is_loopback
from mome.server.folders import Folders, data_folder
from mome.server.guard import unauthorized
from mome.server.http_errors import HttpError
from mome.server.job_queue import JobQueue
from mome.server.log import place_of
from mome.server.metrics import Metrics
from mome.server.scan_kind import ending_of, name_scan
from mome.server.settings import ServerSettings, parse_duration, read_token
from mome.server.store import Store
from mome.server.upload import _Form
from mome.server.worker import public_error
from mome.server.worker_process import WorkerDied


def test_importing_mome_imports_no_server() -> None:
    script = "import sys, mome, mome.cli.main, mome.cli.serve, mome.server.settings; "
    script += "print([m for m in ('fastapi', 'uvicorn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


def test_the_server_process_imports_no_torch() -> None:
    pytest.importorskip("fastapi")
    script = "import sys, mome.server.run, mome.server.app; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


def test_an_address_that_others_reach_needs_a_token(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.delenv("MOME_TOKEN", raising=False)
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "no token protects it" in capsys.readouterr().err
    for host in ("0.0.0.0", "::", "192.168.1.4", "server.example"):
        with pytest.raises(InputError, match="no token protects it"):
            ServerSettings(host=host)
        ServerSettings(host=host, token="x" * 16)
    assert all(is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"))


def test_values_that_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, words in (
        (["--port", "70000"], "from 0 to 65535"),
        (["--queue", "0"], "--queue is at least 1"),
        (["--keep", "soon"], "is no duration"),
        (["--max-upload", "big"], "--max-upload is a number of bytes"),
        (["--allow-origin", "*"], "no origin"),
        (["--dicomweb", "http://pacs.example/"], "can be read by anybody"),
        (["--token-file", str(tmp_path / "none")], "the token cannot be read"),
    ):
        assert main(["serve", *arguments]) == 2, arguments
        assert words in capsys.readouterr().err, arguments


def test_origins_are_written_as_browsers_write_them() -> None:
    """Before, such an origin was taken and never matched."""
    given = ("https://Viewer.example:443", "http://a.example:80", "http://a.example:8080", "https://b.example:80")
    plain = ("https://viewer.example", "http://a.example", "http://a.example:8080", "https://b.example:80")
    assert ServerSettings(origins=given).origins == plain
    assert ServerSettings(origins=("https://[::1]:443", "http://[::80]")).origins == ("https://[::1]", "http://[::80]")


def test_durations() -> None:
    assert [parse_duration(t) for t in ("1h", "30m", "90", "1.5s", "2d", "5min")] == [3600, 1800, 90, 1.5, 172800, 300]


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOME_TOKEN", "from-the-environment")
    (tmp_path / "token").write_text("from-the-file-12345\n")
    assert read_token(tmp_path / "token") == "from-the-file-12345"
    assert read_token(None) == "from-the-environment"
    for wrong in ("short", "with spaces in between", "x" * 2000, "ümläute-are-no-ascii"):
        (tmp_path / "token").write_text(wrong)
        with pytest.raises(InputError, match="16 to 1024") as caught:
            read_token(tmp_path / "token")
        assert wrong not in str(caught.value)
    monkeypatch.delenv("MOME_TOKEN")
    assert read_token(None) is None


def test_the_queue_survives_and_a_job_fails_at_the_second_kill(tmp_path: Path) -> None:
    store = Store(tmp_path / "jobs.sqlite3")
    for name in "abc":
        store.add(name, {"prompts": ["liver"]}, 5)
    assert store.start("a") and not store.start("a")
    assert store.next_queued().id == "b" and store.position("c") == 1
    assert store.finish("b", "cancelled") and not store.finish("b", "done")  # a job ends once
    for attempt in (1, 2):  # the database is left open, as by SIGKILL
        store = Store(tmp_path / "jobs.sqlite3")
        returned, failed = store.recover()
        assert (returned, failed) == ((["a"], []) if attempt == 1 else ([], ["a"]))
        if attempt == 1:
            assert store.next_queued().id == "a"  # at its old place
            store.start("a")
    assert store.get("a").state == "failed" and "2 times" in store.get("a").error["what"]
    store.start("c")
    store.put_back("c")  # a graceful stop does not count
    assert store.get("c").attempts == 0 and store.counts()["queued"] == 1
    assert store.to_remove(time.time() + 1) == ["a", "b"]
    store.hide("b")
    assert store.get("b") is None and store.to_remove(0) == ["b"]
    store.start("c")
    store.hide("c")
    assert store.recover() == ([], []) and store.next_queued() is None  # one that was deleted does not run again


def test_deleted_prompts_are_not_left_in_the_database(tmp_path: Path) -> None:
    store = Store(tmp_path / "jobs.sqlite3")
    for number in range(50):
        store.add(f"job{number}", {"prompts": [f"Eisenbart {number}" * 40]}, 5)
    store.forget([f"job{number}" for number in range(50)])
    assert not any(b"Eisenbart" in path.read_bytes() for path in tmp_path.iterdir())


def test_a_database_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"no database" * 100)
    with pytest.raises(InputError, match="the queue cannot be read"):
        Store(tmp_path / "a")
    with sqlite3.connect(tmp_path / "b") as database:
        database.execute("PRAGMA user_version=99")
    with pytest.raises(InputError, match="another version"):
        Store(tmp_path / "b")


def test_the_data_folder_is_private_and_of_one_server(tmp_path: Path) -> None:
    with data_folder(None) as root:
        assert root.stat().st_mode & 0o777 == 0o700
    assert not root.exists()
    with data_folder(tmp_path / "data") as root:
        assert root.stat().st_mode & 0o777 == 0o700
        script = "import sys; from pathlib import Path; from mome.server.folders import data_folder\n"
        script += f"with data_folder(Path({str(root)!r})): pass"
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert "another server uses this folder" in other.stderr
    os.chmod(root, 0o755)
    with pytest.raises(InputError, match="other users may read"), data_folder(root):
        pass


def test_leftovers_and_space(tmp_path: Path) -> None:
    folders = Folders(tmp_path, free_bytes=1)
    kept, image = folders.new_upload()[0], folders.new_upload()[0]
    (tmp_path / "jobs" / kept).mkdir()
    (tmp_path / "images" / image).mkdir()
    assert folders.remove_leftovers({kept}, {image}) == 2  # the two uploads
    assert folders.remove_leftovers(set(), {image}) == 1
    folders.check_space()
    with pytest.raises(HttpError, match="nearly full"):
        Folders(tmp_path, free_bytes=10**18).check_space()
    with pytest.raises(ValueError):
        folders.job("../../etc")


def test_a_folder_that_cannot_be_removed_is_logged_by_its_id(tmp_path: Path, monkeypatch, caplog) -> None:
    folders = Folders(tmp_path, 0)
    upload_id, path = folders.new_upload()
    monkeypatch.setattr("mome.server.folders.shutil.rmtree", lambda *_, **__: None)
    folders.remove(path)
    assert caplog.messages == [f"uploads/{upload_id} could not be removed"]


@pytest.mark.parametrize(("stops", "status"), [(False, 409), (True, 503)])
def test_an_inference_whose_job_was_deleted_does_not_say_that_the_server_stops(stops: bool, status: int) -> None:
    pytest.importorskip("fastapi")
    from mome.server.monai_label_answers import answer

    async def nothing(*_: object) -> None:
        return None

    async def ask() -> None:
        stopping = asyncio.Event()
        if stops:
            stopping.set()
        queue = SimpleNamespace(wait=nothing, stopping=stopping, cancel=print, delete=lambda _: None)
        await answer(SimpleNamespace(is_disconnected=nothing), queue, SimpleNamespace(id="a"), "all", "nrrd")

    with pytest.raises(HttpError) as caught:
        asyncio.run(ask())
    assert caught.value.status == status


def test_kinds_are_told_by_content(tmp_path: Path) -> None:
    kinds = {
        b"\x1f\x8b\x08": ".nii.gz", b"NRRD0004\n": ".nrrd", b"ObjectType = Image\n": ".mha", b"PK\x03\x04": ".zip",
        bytes(128) + b"DICM": ".dcm", b"\x5c\x01\0\0": ".nii", b"\0\0\x02\x1c": ".nii", b"<html>": None, b"": None,
    }  # fmt: skip
    for content, ending in kinds.items():
        (tmp_path / "x").write_bytes(content)
        assert ending_of(tmp_path / "x") == ending
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(bytes(128) + b"DICM")
    assert name_scan(tmp_path, files) == "dicom"
    assert sorted(path.name for path in (tmp_path / "dicom").iterdir()) == ["000000.dcm", "000001.dcm"]


def test_errors_do_not_tell_the_servers_paths_or_the_scans_values(tmp_path: Path) -> None:
    folder = tmp_path / "jobs" / "1234"
    where = str(folder / "input" / "scan.nii.gz")
    error = InputError(f"cannot read {where}", where=where, hint=f"see {folder}")
    told = public_error(error, folder)
    assert told == {"what": "cannot read scan.nii.gz", "where": "the uploaded scan", "hint": "see the upload"}
    try:
        int("Eisenbart")
    except ValueError as bug:
        assert "Eisenbart" not in str(public_error(bug, folder)) and "ValueError" in str(public_error(bug, folder))
        assert place_of(bug).startswith("ValueError at ")
    refused = public_error(PermissionError(13, "Permission denied", where), folder)  # no bug, as in a run of folders
    assert "system refused a file" in refused["what"] and "bug" not in str(refused) and str(folder) not in str(refused)


def test_texts_before_an_upload_keep_their_slashes() -> None:
    error = InputError("the bank of /home/eisenbart/model is damaged", hint="left/right, or https://example.org/a")
    told = public_error(error, None)
    assert told["what"] == "the bank of the server is damaged"
    assert told["hint"] == "left/right, or https://example.org/a"


def test_a_wrong_token_leaves_nothing_behind() -> None:
    """An error that is raised again and again would keep the frames, and so the requests, of every time before."""
    for _ in range(3):
        with pytest.raises(HttpError) as caught:
            raise unauthorized()
        assert len(caught.traceback) == 1


def test_headers_of_a_form_are_limited(tmp_path: Path) -> None:
    form = _Form(tmp_path, ("file",), None)
    for _ in range(3):
        form.on_header_value(b"x" * 2000, 0, 2000)
    assert isinstance(form.error, InputError) and len(form._value) <= 4096


def test_the_fields_of_a_form_are_limited_together(tmp_path: Path) -> None:
    """Before, each of the 32 uploads could hold 64 MB of texts in memory, an inference until its job had ended."""
    form = _Form(tmp_path, ("file",), None)
    for _ in range(100):
        form._name, form._field = "params", bytearray()
        form.on_part_data(b"x" * 60_000, 0, 60_000)
        form.on_part_end()
    assert isinstance(form.error, InputError) and "the fields have more than" in str(form.error)
    assert sum(len(text) for texts in form.fields.values() for text in texts) <= 1 << 20


class Mortal:
    """A worker that can end while no job runs."""

    def __init__(self) -> None:
        self.is_ready, self.starts = False, 0

    async def start(self) -> None:
        self.is_ready, self.starts = True, self.starts + 1

    async def stop(self) -> None:
        self.is_ready = False

    async def check(self, *request: object) -> dict[str, object]:
        if not self.is_ready:
            raise WorkerDied(-9)
        return {"error": None, "names": ["liver"]}


def test_a_worker_that_ends_while_it_waits_is_started_again(tmp_path: Path) -> None:
    """Before, every request was answered by 503 until somebody restarted the server."""

    async def run() -> tuple[list[str], int]:
        store = Store(tmp_path / "jobs.sqlite3")
        queue = JobQueue(ServerSettings(), Folders(tmp_path, 0), store, Metrics())
        queue.worker = worker = Mortal()  # type: ignore[assignment]
        await queue.start()
        await asyncio.sleep(0)
        worker.is_ready = False
        names = await asyncio.wait_for(queue.check(["liver"], ["nifti"]), 10)
        await queue.stop(0)
        store.close()
        return names, worker.starts

    assert asyncio.run(run()) == (["liver"], 2)


class Deaf(Mortal):
    """A worker that hears no cancel, as while it reads a large scan."""

    async def run(self, *job: object) -> None:
        await asyncio.Event().wait()

    def cancel(self, job_id: str) -> None:
        pass


@pytest.mark.parametrize(("cancels", "state"), [(True, "cancelled"), (False, "queued")])
def test_a_cancelled_job_does_not_return_to_the_queue(tmp_path: Path, monkeypatch, cancels: bool, state: str) -> None:
    """Before, a server that stopped before the worker heard of the cancel ran the job again at its next start."""
    job = "5c9f2a9e-0f0c-4a51-9b53-0d8c0a9f6a11"
    wait = asyncio.wait
    monkeypatch.setattr(asyncio, "wait", lambda tasks, timeout=None, **how: wait(tasks, timeout=timeout and 0.1, **how))

    async def run() -> str:
        store = Store(tmp_path / "jobs.sqlite3")
        queue = JobQueue(ServerSettings(), Folders(tmp_path, 0), store, Metrics())
        queue.worker = Deaf()  # type: ignore[assignment]
        store.add(job, {}, 1)
        await queue.start()
        while store.get(job).state != "running":
            await asyncio.sleep(0.01)
        if cancels:
            queue.cancel(job)
        await queue.stop(0)
        found = store.get(job).state
        store.close()
        return found

    assert asyncio.run(run()) == state


def test_a_full_disk_does_not_end_the_removal_of_old_jobs(tmp_path: Path) -> None:
    async def run() -> int:
        store = Store(tmp_path / "jobs.sqlite3")
        queue = JobQueue(ServerSettings(keep_s=1.0), Folders(tmp_path, 0), store, Metrics())
        queue.worker = Mortal()  # type: ignore[assignment]
        asked, forget = [], store.forget

        def full_once(jobs: list[str]) -> None:
            asked.append(jobs)
            if len(asked) == 1:
                raise sqlite3.OperationalError("database or disk is full")
            forget(jobs)

        store.forget = full_once  # type: ignore[method-assign, assignment]
        store.add("5c9f2a9e-0f0c-4a51-9b53-0d8c0a9f6a11", {}, 1)
        store.finish("5c9f2a9e-0f0c-4a51-9b53-0d8c0a9f6a11", "done")
        await queue.start()
        deadline = time.monotonic() + 10
        while store.ids() and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        left = len(store.ids())
        await queue.stop(0)
        store.close()
        return left

    assert asyncio.run(run()) == 0


def test_a_binary_seg_is_a_format_with_a_plain_name() -> None:
    """Names of formats become names of files, so that no config string of a client is one."""
    pytest.importorskip("highdicom", reason="DICOM SEG needs mome[dicom]")
    from mome.server.results import check_formats, formats, writer_of
    from mome.volumes.writers.base import build_writer

    assert all(name.replace("_", "").isalnum() for name in formats())
    assert check_formats(["dicom_seg_binary"]) == ["dicom_seg_binary", "json"]
    kinds = [vars(build_writer(str(writer_of(name))))["kind"] for name in ("dicom_seg", "dicom_seg_binary")]
    assert kinds == ["auto", "binary"] and writer_of("html") is None
    with pytest.raises(InputError, match="there is no format"):
        check_formats(["dicom_seg(kind=binary)"])
