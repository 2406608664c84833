"""The server's queue when the disk is full, the clock is changed, or an earlier server ended at a bad moment."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_server_parts import Mortal

from mome.errors import OutputError
from mome.server.folders import Folders
from mome.server.http_errors import HttpError
from mome.server.job_queue import JobQueue
from mome.server.kept_images import KeptImages
from mome.server.metrics import Metrics
from mome.server.settings import ServerSettings
from mome.server.store import Store
from mome.server.upload import Upload

ONE, TWO = "5c9f2a9e-0f0c-4a51-9b53-0d8c0a9f6a11", "5c9f2a9e-0f0c-4a51-9b53-0d8c0a9f6a12"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "jobs.sqlite3")


def queue_of(store: Store, tmp_path: Path, keep_s: float = 100.0) -> JobQueue:
    queue = JobQueue(ServerSettings(keep_s=keep_s), Folders(tmp_path, 0), store, Metrics())
    queue.worker = Mortal()
    return queue


def full(*_: object, **__: object) -> None:
    raise sqlite3.OperationalError("database or disk is full")


def in_queue(queue: JobQueue, use: Callable[[], Any]) -> Any:
    async def run() -> Any:
        await queue.start()
        try:
            return use()
        finally:
            await queue.stop(0)

    return asyncio.run(run())


def test_a_clock_that_is_changed_keeps_nothing_longer(store: Store, tmp_path: Path, monkeypatch) -> None:
    queue = queue_of(store, tmp_path)
    store.add(ONE, {}, 1)
    store.finish(ONE, "done")
    store.add_image(TWO, "scan.nii", 1)
    ended, real = store.get(ONE).finished, time.time
    for jump in (-86400.0, 86400.0 * 30):
        monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
        queue._retention.follow_clock()
        assert store.get(ONE).finished == pytest.approx(ended + jump, abs=0.5)
        assert store.image(TWO).used == pytest.approx(ended + jump, abs=0.5)
        queue._retention.follow_clock()  # once only
        assert store.get(ONE).finished == pytest.approx(ended + jump, abs=0.5)
        assert store.to_remove(time.time() - 100) == [] and store.to_remove(time.time() + 1) == [ONE]


def test_times_in_the_future_do_not_keep_a_job_for_ever(store: Store, tmp_path: Path, monkeypatch) -> None:
    store.add(ONE, {}, 1)
    with monkeypatch.context() as wrong:
        wrong.setattr(time, "time", lambda: 4e9)  # the clock of the earlier server was wrong
        store.finish(ONE, "done")
        store.add_image(TWO, "scan.nii", 1)
    in_queue(queue_of(store, tmp_path), lambda: None)
    assert store.to_remove(time.time() + 1) == [ONE] and store.image_ids(time.time() + 1) == [TWO]


def test_results_go_on_time(store: Store, tmp_path: Path) -> None:
    queue = queue_of(store, tmp_path, keep_s=1.0)
    store.add(ONE, {}, 1)
    queue.folders.job(ONE).mkdir()
    began = time.monotonic()  # on a busy machine, starting the queue may take a part of the second
    store.finish(ONE, "done")

    async def run() -> float:
        await queue.start()
        while queue.folders.job(ONE).exists() or store.ids():  # the record goes after the files
            assert time.monotonic() - began < 10
            await asyncio.sleep(0.02)
        await queue.stop(0)
        return time.monotonic() - began

    assert 0.5 < asyncio.run(run())
    assert store.ids() == []


def test_what_a_killed_server_left_is_removed(store: Store, tmp_path: Path) -> None:
    """It ended between the end of a job and the removal of its files, or after a job was deleted while it ran."""
    queue = queue_of(store, tmp_path)
    for job, state in ((ONE, "failed"), (TWO, "done")):
        store.add(job, {}, 1)
        store.finish(job, state)
        for part in ("input", "result"):
            (queue.folders.job(job) / part).mkdir(parents=True)
            (queue.folders.job(job) / part / "scan.nii.gz").write_bytes(b"x")
    deleted = ONE.replace("5", "6")
    store.add(deleted, {}, 1)
    store.start(deleted)
    store.hide(deleted)
    queue.folders.job(deleted).mkdir()
    in_queue(queue, lambda: None)
    left = {path.relative_to(tmp_path / "jobs").as_posix() for path in (tmp_path / "jobs").rglob("*")}
    assert left == {ONE, TWO, f"{TWO}/result", f"{TWO}/result/scan.nii.gz"}
    assert set(store.ids()) == {ONE, TWO}


def test_a_full_disk_is_no_bug(store: Store, tmp_path: Path, monkeypatch) -> None:
    """Uploads, jobs and images are refused with status 507, and leave nothing behind."""
    queue = queue_of(store, tmp_path)

    def refused(use: Callable[[], Any]) -> None:
        with pytest.raises(HttpError) as caught:
            use()
        assert caught.value.status == 507

    images = KeptImages(queue.folders, store, 5)
    for broken in ("rename", "database"):
        upload_id, folder = queue.folders.new_upload()
        upload = Upload(upload_id, folder, "scan.nii", 1)
        with monkeypatch.context() as full_disk:
            if broken == "rename":
                full_disk.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
            full_disk.setattr(store, "add", full)
            full_disk.setattr(store, "add_image", full)
            refused(lambda upload=upload: queue.submit(upload, ["liver"], ["nifti"], {}))
            upload.folder.mkdir(parents=True, exist_ok=True)
            refused(lambda upload=upload: images.add(upload))
    assert not [path for name in ("uploads", "jobs", "images") for path in (tmp_path / name).iterdir()]
    with monkeypatch.context() as full_disk:
        full_disk.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
        refused(queue.folders.new_upload)


def test_an_image_that_replaces_another_is_not_one_too_many(store: Store, tmp_path: Path) -> None:
    images = KeptImages(Folders(tmp_path, 0), store, 1)

    def upload() -> Upload:
        upload_id, folder = images._folders.new_upload()
        return Upload(upload_id, folder, "scan.nii", 1)

    first = images.add(upload())
    with pytest.raises(HttpError, match="too many images"):
        images.add(upload())
    second = images.add(upload(), instead_of=first)
    assert images.remove(first) and store.image_ids() == [second]


def test_a_start_on_a_full_disk_says_so(store: Store, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(store, "recover", full)
    with pytest.raises(OutputError, match="the queue cannot be written: database or disk is full"):
        in_queue(queue_of(store, tmp_path), lambda: None)


def test_a_database_that_cannot_be_written_answers_507(store: Store, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("fastapi", reason="the server needs mome[serve]")
    from mome.server.app import create_app

    app = create_app(queue_of(store, tmp_path))
    monkeypatch.setattr(store, "get", full)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": f"/jobs/{ONE}", "raw_path": b"/", "query_string": b"", "root_path": "",
        "headers": [(b"host", b"127.0.0.1")], "client": None, "server": None,
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 507
    assert "the queue cannot be written" in json.loads(sent[1]["body"])["what"]


def test_a_full_disk_at_the_results_is_told_to_the_client(tmp_path: Path) -> None:
    from mome.server.worker import public_error

    folder = tmp_path / "jobs" / ONE
    full_disk = OutputError("the results could not be written: No space left", where=str(folder), hint="another folder")
    told = public_error(full_disk, folder)
    assert told["what"] == "the results could not be written: No space left" and str(tmp_path) not in str(told)
    assert told["hint"].startswith("the server's disk is full or broken")


def test_hints_speak_of_fields() -> None:
    from mome.server.client_words import in_client_words

    told = {
        "give the folder, or write NIfTI: --writer nifti": "give the folder, or write NIfTI: output=nifti",
        "choose one: --series 1, in Python dicom=DicomOptions(series=1); mome info lists them": "choose one: series=1",
        "give the folder of the DICOM series, or write NIfTI: --writer nifti": "upload the files of the DICOM series, "
        "or write NIfTI: output=nifti",
        "give the folder that holds the whole series": "upload all files of the series",
        "a larger --memory (this process holds 1.2 GB already), a machine with more memory, or a part of the scan": "a "
        "machine with more memory, or a part of the scan",
        "mome info lists them": None,
        "choose one from 0 to 3: mome segment --frame 0, in Python frame=0": "choose one from 0 to 3: frame=0",
        "leave out --series (in Python DicomOptions.series)": "leave out series",
        "copy it again, or --allow-gaps (in Python DicomOptions(allow_gaps=True)) for air": "copy it again, or "
        "allow_gaps=true for air",
        None: None,
    }
    assert {hint: in_client_words(hint) for hint in told} == told


def test_no_error_of_a_reader_or_writer_names_an_option_to_a_client() -> None:
    """Every hint in the source that names an option of the command line becomes one that names a field."""
    import ast

    import mome
    from mome.server.client_words import in_client_words

    root = Path(mome.__file__).parent / "volumes"
    hints = [
        "".join(part.value if isinstance(part, ast.Constant) else "1" for part in ast.walk(keyword.value)
                if isinstance(part, ast.Constant) and isinstance(part.value, str))
        for path in root.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text())) if isinstance(call, ast.Call)
        for keyword in call.keywords if keyword.arg == "hint"
    ]  # fmt: skip
    assert sum("--" in hint for hint in hints) >= 8
    assert [hint for hint in hints if "--" in (in_client_words(hint) or "")] == []
