"""The queue as the routes see it: takes uploads, cancels, deletes, and tells how jobs are."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from typing import Any

from mome.errors import OutputError
from mome.server.folders import Folders
from mome.server.http_errors import HttpError
from mome.server.job_records import JobRecords
from mome.server.job_runner import JobRunner
from mome.server.kept_images import KeptImages
from mome.server.log import LOGGER, megabytes
from mome.server.metrics import Metrics
from mome.server.retention import Retention
from mome.server.settings import ServerSettings
from mome.server.store import ENDED, Job, Store
from mome.server.upload import Upload
from mome.server.worker_process import WorkerProcess

_HEARTBEAT_S = 15.0


class JobQueue:
    """The queue and its worker.

    Args:
        settings: The settings.
        folders: The server's folder.
        store: The database.
        metrics: Counters.

    Attributes:
        uploading: Uploads that are being received.
        images: Images that are kept for later jobs.
    """

    def __init__(self, settings: ServerSettings, folders: Folders, store: Store, metrics: Metrics) -> None:
        self.settings, self.folders, self.store, self.metrics = settings, folders, store, metrics
        self.uploading = 0
        self.images = KeptImages(folders, store, settings.queue)
        self._records = JobRecords(folders, store, metrics)
        self._runner = JobRunner(settings, self._records)
        self._retention = Retention(self._records, self.images, self._runner, settings.keep_s)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def worker(self) -> WorkerProcess:
        """The worker."""
        return self._runner.worker

    @worker.setter
    def worker(self, worker: WorkerProcess) -> None:
        self._runner.worker = worker

    @property
    def stopping(self) -> asyncio.Event:
        """Set when the server stops."""
        return self._runner.stopping

    async def start(self) -> None:
        """Loads the model, takes up what an earlier server left, and begins.

        Raises:
            InputError: The model cannot be loaded.
            OutputError: The database cannot be written.
        """
        try:
            self._take_up()
        except sqlite3.Error as error:
            raise OutputError(
                f"the queue cannot be written: {error}",
                where=str(self.folders.database),
                hint="free some disk space, or give another --data folder",
            ) from error
        await self._runner.start()
        self._tasks = [asyncio.create_task(self._runner.run()), asyncio.create_task(self._retention.run())]

    def _take_up(self) -> None:
        """Makes database and files agree after an earlier server has ended, at whatever moment."""
        returned, failed = self.store.recover()
        for job_id in returned:
            LOGGER.info("job %s returned to the queue: the server had ended while it ran", job_id)
        for job_id in failed:
            LOGGER.warning("job %s failed: the server had ended again while it ran", job_id)
        if deleted := self.store.deleted_ids():
            self.store.forget(deleted)
        removed = self.folders.remove_leftovers(set(self.store.ids()), set(self.store.image_ids()))
        if removed:
            LOGGER.info("removed %d folders that an earlier server left", removed)
        for job_id in self.store.ids():
            job = self.store.get(job_id)
            if job is not None and job.state in ENDED:
                self._records.remove_files(job_id, job.state)
        self._retention.start()

    async def stop(self, grace_s: float) -> None:
        """Lets the running job finish within `grace_s` seconds, else returns it to the queue, and ends the worker."""
        self.stop_streams()
        if self._runner.running is not None and grace_s > 0:
            await asyncio.wait([self._tasks[0]], timeout=grace_s)
        if self._runner.running is not None:
            self.worker.cancel(self._runner.running)
            await asyncio.wait([self._tasks[0]], timeout=5)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._runner.put_back()
        await self.worker.stop()

    def stop_streams(self) -> None:
        """Accepts no more jobs and starts none, and ends the streams of events."""
        self.stopping.set()
        self._runner.wake()
        self._records.notify_all()

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

    async def check(
        self, prompts: list[str], outputs: list[str], upload: Upload | None = None, model: str | None = None
    ) -> list[str]:
        """Returns the names of the masks that a request makes.

        Args:
            prompts: The prompts.
            outputs: The formats.
            upload: The upload; None while it is not complete.
            model: The model that the client has named, if any.

        Raises:
            HttpError: The request cannot be served; status 422, or 503 while the worker starts.
        """
        folder, source = (None, None) if upload is None else (upload.folder, upload.source)
        return await self._runner.check(prompts, outputs, folder, source, model)

    def submit(self, upload: Upload, prompts: list[str], outputs: list[str], options: dict[str, Any]) -> Job:
        """Accepts a job: its files move into its folder, and it is stored before the client hears of it.

        Raises:
            HttpError: The folder or the database cannot be written; status 507.
        """
        request = {"source": upload.source, "prompts": prompts, "outputs": outputs, "options": options}
        try:
            upload.folder.rename(self.folders.job(upload.id))
            self.store.add(upload.id, request, upload.bytes)
        except (sqlite3.Error, OSError) as error:
            self.folders.remove(upload.folder)
            self.folders.remove(self.folders.job(upload.id))
            raise HttpError(507, "the queue cannot be written: the server's disk is full or broken") from error
        self.metrics.accepted += 1
        self.metrics.upload_bytes += upload.bytes
        LOGGER.info("job %s queued, %s", upload.id, megabytes(upload.bytes))
        self._runner.wake()
        job = self.store.get(upload.id)
        assert job is not None
        return job

    def cancel(self, job_id: str) -> None:
        """Cancels a job that waits at once, and one that runs at its next tile; one that has ended stays as it is."""
        job = self.store.get(job_id)
        if job is None or job.state in ENDED:
            return
        if job.state == "queued":
            self._records.end(job_id, "cancelled")
        else:
            self._runner.cancel(job_id)

    def delete(self, job_id: str) -> None:
        """Deletes a job and its files; one that runs is cancelled, and its files go when it has stopped."""
        self.cancel(job_id)
        self.store.hide(job_id)
        if self._runner.running != job_id:
            self._records.remove(job_id)
        self._records.notify(job_id)

    def snapshot(self, job: Job) -> dict[str, Any]:
        """Returns what clients see of a job."""
        return {
            "id": job.id,
            "state": job.state,
            "created": round(job.created, 3),
            "started": job.started and round(job.started, 3),
            "finished": job.finished and round(job.finished, 3),
            "position": self.store.position(job.id),
            "progress": self._runner.progress(job.id) if job.state == "running" else None,
            "prompts": job.request["prompts"],
            "bytes": job.bytes,
            "error": job.error,
            "result": job.summary,
        }

    async def watch(self, job_id: str) -> AsyncIterator[dict[str, Any]]:
        """Yields a job's snapshots when they change and every 15 s, until it has ended or the server stops."""
        while True:
            job = self.store.get(job_id)
            if job is None:
                return
            if job.state in ENDED or self.stopping.is_set():
                yield self.snapshot(job)
                return
            signal = self._records.signal(job_id)
            yield self.snapshot(job)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(signal.wait(), _HEARTBEAT_S)

    async def wait(self, job_id: str) -> Job | None:
        """Waits until a job has ended, and returns it; None where it was deleted or the server stops."""
        async for snapshot in self.watch(job_id):
            if snapshot["state"] in ENDED:
                break
        job = self.store.get(job_id)
        return job if job is not None and job.state in ENDED else None
