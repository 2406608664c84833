"""Runs the jobs one after another, and keeps nothing longer than asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from mome.errors import InputError
from mome.server.folders import Folders
from mome.server.http_errors import HttpError, error_body
from mome.server.log import LOGGER, megabytes, place_of
from mome.server.metrics import Metrics
from mome.server.settings import ServerSettings
from mome.server.store import ENDED, Job, Store
from mome.server.upload import Upload
from mome.server.worker_process import WorkerDied, WorkerProcess

_LONGEST_BACKOFF_S = 60.0
_MOST_SECONDS_UNTIL_READY = 120.0
_HEARTBEAT_S = 15.0
_DISK_PAUSE_S = 5.0


class JobQueue:
    """The queue and its worker.

    Args:
        settings: The settings.
        folders: The server's folder.
        store: The database.
        metrics: Counters.

    Attributes:
        uploading: Uploads that are being received.
    """

    def __init__(self, settings: ServerSettings, folders: Folders, store: Store, metrics: Metrics) -> None:
        self.settings, self.folders, self.store, self.metrics = settings, folders, store, metrics
        self.worker = WorkerProcess(settings)
        self.uploading = 0
        self.stopping = asyncio.Event()
        self._work = asyncio.Event()
        self._is_ready = asyncio.Event()
        self._running: str | None = None
        self._cancelled: set[str] = set()
        self._progress: dict[str, dict[str, Any]] = {}
        self._signals: dict[str, asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Loads the model, takes up what an earlier server left, and begins.

        Raises:
            InputError: The model cannot be loaded.
        """
        returned, failed = self.store.recover()
        for job_id in returned:
            LOGGER.info("job %s returned to the queue: the server had ended while it ran", job_id)
        for job_id in failed:
            LOGGER.warning("job %s failed: the server had ended again while it ran", job_id)
        removed = self.folders.remove_leftovers(set(self.store.ids()), set(self.store.image_ids()))
        if removed:
            LOGGER.info("removed %d folders that an earlier server left", removed)
        for job_id in self.store.ids():
            job = self.store.get(job_id)
            if job is not None and job.state in ENDED:
                self.folders.remove(self.folders.job(job_id) / "input")
        try:
            await self.worker.start()
        except WorkerDied as died:
            raise InputError(
                f"the worker ended with code {died.code} before the model was loaded", hint="mome segment says why"
            ) from died
        self._is_ready.set()
        self._work.set()
        self._tasks = [asyncio.create_task(self._run_jobs()), asyncio.create_task(self._remove_old())]

    async def stop(self, grace_s: float) -> None:
        """Lets the running job finish within `grace_s` seconds, else returns it to the queue, and ends the worker."""
        self.stop_streams()
        if self._running is not None and grace_s > 0:
            runner = self._tasks[0]
            await asyncio.wait([runner], timeout=grace_s)
        if self._running is not None:
            self.worker.cancel(self._running)
            await asyncio.wait([self._tasks[0]], timeout=5)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._running is not None and self.store.put_back(self._running):
            LOGGER.info("job %s returned to the queue: the server stops", self._running)
        await self.worker.stop()

    def stop_streams(self) -> None:
        """Accepts no more jobs and starts none, and ends the streams of events."""
        self.stopping.set()
        self._work.set()
        for event in self._signals.values():
            event.set()

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Holds a place in the queue while an upload is received.

        Raises:
            HttpError: The queue is full, or the server stops; status 503.
        """
        if self.stopping.is_set():
            raise HttpError(503, "the server stops", hint="try again later", retry_s=30)
        if self.uploading + self.store.counts()["queued"] >= self.settings.queue:
            self.metrics.refused += 1
            raise HttpError(503, "the queue is full", hint="try again later", retry_s=5)
        self.uploading += 1
        try:
            yield
        finally:
            self.uploading -= 1

    async def check(self, prompts: list[str], outputs: list[str], upload: Upload | None = None) -> list[str]:
        """Returns the names of the masks that a request makes.

        Raises:
            HttpError: The request cannot be served; status 422, or 503 while the worker starts.
        """
        folder, source = (None, None) if upload is None else (upload.folder, upload.source)
        for _ in range(2):
            try:
                await asyncio.wait_for(self._is_ready.wait(), _MOST_SECONDS_UNTIL_READY)
                answer = await self.worker.check(prompts, outputs, folder, source)
            except TimeoutError:
                continue
            except WorkerDied:
                # `_run_jobs` starts another one; where no job runs, it waits for jobs and has not noticed.
                self._is_ready.clear()
                self._work.set()
                continue
            if answer["error"] is not None:
                raise HttpError(422, **answer["error"])
            return list(answer["names"])
        raise HttpError(503, "the worker starts again", hint="try again later", retry_s=30)

    def submit(self, upload: Upload, prompts: list[str], outputs: list[str], options: dict[str, Any]) -> Job:
        """Accepts a job: its files move into its folder, and it is stored before the client hears of it.

        Raises:
            HttpError: The database cannot be written; status 507.
        """
        upload.folder.rename(self.folders.job(upload.id))
        request = {"source": upload.source, "prompts": prompts, "outputs": outputs, "options": options}
        try:
            self.store.add(upload.id, request, upload.bytes)
        except sqlite3.Error as error:
            self.folders.remove(self.folders.job(upload.id))
            raise HttpError(507, "the queue cannot be written: the server's disk is full or broken") from error
        self.metrics.accepted += 1
        self.metrics.upload_bytes += upload.bytes
        LOGGER.info("job %s queued, %s", upload.id, megabytes(upload.bytes))
        self._work.set()
        job = self.store.get(upload.id)
        assert job is not None
        return job

    def cancel(self, job_id: str) -> None:
        """Cancels a job that waits at once, and one that runs at its next tile; one that has ended stays as it is."""
        job = self.store.get(job_id)
        if job is None or job.state in ENDED:
            return
        if job.state == "queued":
            self._end(job_id, "cancelled")
            return
        self._cancelled.add(job_id)
        self.worker.cancel(job_id)

    def delete(self, job_id: str) -> None:
        """Deletes a job and its files; one that runs is cancelled, and its files go when it has stopped."""
        self.cancel(job_id)
        self.store.hide(job_id)
        if self._running != job_id:
            self._remove(job_id)
        self._notify(job_id)

    def snapshot(self, job: Job) -> dict[str, Any]:
        """Returns what clients see of a job."""
        return {
            "id": job.id,
            "state": job.state,
            "created": round(job.created, 3),
            "started": job.started and round(job.started, 3),
            "finished": job.finished and round(job.finished, 3),
            "position": self.store.position(job.id),
            "progress": self._progress.get(job.id) if job.state == "running" else None,
            "prompts": job.request["prompts"],
            "bytes": job.bytes,
            "error": job.error,
            "result": job.summary,
        }

    async def watch(self, job_id: str) -> AsyncIterator[dict[str, Any]]:
        """Yields a job's snapshots when they change and every 15 s, until it has ended or the server stops."""
        while True:
            signal = self._signals.setdefault(job_id, asyncio.Event())
            job = self.store.get(job_id)
            if job is None:
                self._signals.pop(job_id, None)
                return
            yield self.snapshot(job)
            if job.state in ENDED or self.stopping.is_set():
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(signal.wait(), _HEARTBEAT_S)

    async def wait(self, job_id: str) -> Job | None:
        """Waits until a job has ended, and returns it; None where it was deleted or the server stops."""
        async for snapshot in self.watch(job_id):
            if snapshot["state"] in ENDED:
                break
        job = self.store.get(job_id)
        return job if job is not None and job.state in ENDED else None

    def _notify(self, job_id: str) -> None:
        event = self._signals.pop(job_id, None)
        if event is not None:
            event.set()

    async def _run_jobs(self) -> None:
        """Takes jobs from the queue until the server stops."""
        while not self.stopping.is_set():
            if not self._is_ready.is_set():
                LOGGER.error("the worker ended while no job ran")
                await self._restart_worker()
                continue
            try:
                job = self.store.next_queued()
                is_started = job is not None and self.store.start(job.id)
            except sqlite3.Error as error:
                await self._pause_for_disk(error)
                continue
            if job is None:
                self._work.clear()
                await self._work.wait()
                continue
            if is_started:
                self._running = job.id
                self._notify(job.id)
                lives = True
                try:
                    lives = await self._run(job)
                except Exception as error:
                    LOGGER.error("job %s failed by a bug: %s", job.id, place_of(error))
                    body = error_body("this is a bug in mome", hint="see the server's log")
                    await self._end_surely(job.id, "failed", error=body)
                self._running = None
                self._progress.pop(job.id, None)
                self._cancelled.discard(job.id)
                with _disk_errors():  # what could not be removed now, `_remove_old` removes
                    if self.store.get(job.id) is None:
                        self._remove(job.id)
                if not lives:
                    await self._restart_worker()

    async def _run(self, job: Job) -> bool:
        """Runs one job in the worker and stores how it ended; returns whether the worker still lives."""
        LOGGER.info("job %s runs", job.id)

        def on_progress(progress: dict[str, Any]) -> None:
            self._progress[job.id] = progress
            self._notify(job.id)

        if job.id in self._cancelled:
            await self._end_surely(job.id, "cancelled")
            return True
        folder = self.folders.job(job.id)
        limit = self.settings.time_limit_s
        try:
            end = await asyncio.wait_for(self.worker.run(job.id, folder, job.request, on_progress), limit)
        except TimeoutError:
            self.worker.kill()
            what = f"the job took longer than {limit:g} s"
            await self._end_surely(
                job.id, "failed", error=error_body(what, hint="a smaller scan; the server's option --time-limit")
            )
            return False
        except WorkerDied as died:
            if job.id in self._cancelled:
                await self._end_surely(job.id, "cancelled")
            else:
                await self._end_surely(job.id, "failed", error=_death(died.code))
            return False
        if end["state"] == "cancelled" and job.id not in self._cancelled and self.stopping.is_set():
            if self.store.put_back(job.id):
                LOGGER.info("job %s returned to the queue: the server stops", job.id)
        else:
            await self._end_surely(job.id, end["state"], error=end.get("error"), summary=end.get("summary"))
        return True

    async def _restart_worker(self) -> None:
        """Starts another worker, again and again with growing pauses."""
        self._is_ready.clear()
        pause = 0.0
        while not self.stopping.is_set():
            self.metrics.worker_restarts += 1
            await asyncio.sleep(pause)
            pause = min(_LONGEST_BACKOFF_S, max(1.0, 2 * pause))
            try:
                await self.worker.stop()
                await self.worker.start()
            except (WorkerDied, InputError, OSError) as error:
                LOGGER.error("the worker cannot start: %s", place_of(error))
                continue
            self._is_ready.set()
            return

    async def _end_surely(self, job_id: str, state: str, **found: Any) -> None:
        """Stores the end of a job, again and again while the disk is full; the job's scan is removed before."""
        self.folders.remove(self.folders.job(job_id) / "input")
        while True:
            try:
                self._end(job_id, state, **found)
                return
            except sqlite3.Error as error:
                await self._pause_for_disk(error)

    async def _pause_for_disk(self, error: sqlite3.Error) -> None:
        LOGGER.error("the queue cannot be written: %s", type(error).__name__)
        await asyncio.sleep(_DISK_PAUSE_S)

    def _end(self, job_id: str, state: str, **found: Any) -> None:
        """Stores the end of a job; its scan is not needed any more."""
        if self.store.finish(job_id, state, **found):
            self.metrics.ended[state] += 1
            job = self.store.get(job_id)
            seconds = 0.0 if job is None or job.started is None else time.time() - job.started
            if state == "done":
                self.metrics.job_seconds += seconds
            LOGGER.info("job %s %s, %.1f s", job_id, state, seconds)
        self.folders.remove(self.folders.job(job_id) / "input")
        if state != "done":
            self.folders.remove(self.folders.job(job_id) / "result")
        self._notify(job_id)

    def _remove(self, job_id: str) -> None:
        self.folders.remove(self.folders.job(job_id))
        self.store.forget([job_id])

    async def _remove_old(self) -> None:
        """Removes jobs and images that were kept for long enough."""
        while True:
            await asyncio.sleep(min(30.0, self.settings.keep_s / 4))
            with _disk_errors():
                await self._remove_before(time.time() - self.settings.keep_s)

    async def _remove_before(self, before: float) -> None:
        old = [job_id for job_id in self.store.to_remove(before) if job_id != self._running]
        for job_id in old:
            await asyncio.to_thread(self.folders.remove, self.folders.job(job_id))
            self._notify(job_id)
        self.store.forget(old)
        for image_id in self.store.image_ids(before):
            self.remove_image(image_id)

    def remove_image(self, image_id: str) -> bool:
        """Removes an uploaded image; False where there is none."""
        found = self.store.forget_image(image_id)
        if found:
            self.folders.remove(self.folders.image(image_id))
        return found

    def add_image(self, upload: Upload) -> str:
        """Keeps an upload as an image for later jobs and returns its id.

        Raises:
            HttpError: As many images are kept as jobs may wait, status 503; or the database cannot be written, 507.
        """
        if len(self.store.image_ids()) >= self.settings.queue:
            self.folders.remove(upload.folder)
            raise HttpError(
                503, "too many images are kept", hint="DELETE /session/{id}, or try again later", retry_s=60
            )
        upload.folder.rename(self.folders.image(upload.id))
        try:
            self.store.add_image(upload.id, upload.source, upload.bytes)
        except sqlite3.Error as error:
            self.folders.remove(self.folders.image(upload.id))
            raise HttpError(507, "the image cannot be kept: the server's disk is full or broken") from error
        LOGGER.info("image %s stored, %s", upload.id, megabytes(upload.bytes))
        return upload.id

    def upload_from_image(self, image_id: str) -> Upload | None:
        """Returns an upload that shares the files of an image; None where there is no such image.

        Raises:
            HttpError: The folder cannot be written; status 507.
        """
        image = self.store.image(image_id, use=True)
        if image is None:
            return None
        upload_id, folder = self.folders.new_upload()
        source = self.folders.image(image_id) / "input" / image.source
        target: Path = folder / "input" / image.source
        try:
            if source.is_dir():
                shutil.copytree(source, target, copy_function=os.link)
            else:
                os.link(source, target)
        except OSError as error:
            self.folders.remove(folder)
            raise HttpError(507, "the image cannot be taken: the server's disk is full or broken") from error
        return Upload(upload_id, folder, image.source, image.bytes)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Logs errors of the database, as of a full disk, which must not end the task that runs or removes jobs."""
    try:
        yield
    except sqlite3.Error as error:
        LOGGER.error("the queue cannot be written: %s", type(error).__name__)


def _death(code: int | None) -> dict[str, Any]:
    """Returns the error of a job during which the worker ended."""
    if code == -9:
        return error_body(
            "the worker was killed while this job ran, most likely because the memory was not enough",
            hint="a smaller scan or fewer prompts",
        )
    return error_body(f"the worker ended with code {code} while this job ran", hint="is the scan damaged?")
