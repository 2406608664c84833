"""Runs the jobs of the queue one after another in the worker, and starts another worker when one has ended."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from typing import Any

from mome.errors import InputError
from mome.server.http_errors import HttpError, error_body
from mome.server.job_records import JobRecords, disk_errors
from mome.server.log import LOGGER, place_of
from mome.server.settings import ServerSettings
from mome.server.store import Job
from mome.server.worker_process import WorkerDied, WorkerProcess

_LONGEST_BACKOFF_S = 60.0
_MOST_SECONDS_UNTIL_READY = 120.0


class JobRunner:
    """The worker and the job that runs in it.

    Args:
        settings: The settings.
        records: The jobs.

    Attributes:
        worker: The worker.
        running: The id of the job that runs.
        stopping: Set when no more jobs are to be started.
    """

    def __init__(self, settings: ServerSettings, records: JobRecords) -> None:
        self.worker = WorkerProcess(settings)
        self.running: str | None = None
        self.stopping = asyncio.Event()
        self._records, self._store = records, records.store
        self._time_limit_s = settings.time_limit_s
        self._work = asyncio.Event()
        self._is_ready = asyncio.Event()
        self._cancelled: set[str] = set()
        self._progress: dict[str, dict[str, Any]] = {}

    async def start(self) -> None:
        """Starts the worker.

        Raises:
            InputError: The model cannot be loaded.
        """
        try:
            await self.worker.start()
        except WorkerDied as died:
            raise InputError(
                f"the worker ended with code {died.code} before the model was loaded", hint="mome segment says why"
            ) from died
        self._is_ready.set()
        self._work.set()

    def wake(self) -> None:
        """Says that there may be a job to run, or that no more are to be run."""
        self._work.set()

    def progress(self, job_id: str) -> dict[str, Any] | None:
        """Returns `phase`, `done` and `total` of the job that runs."""
        return self._progress.get(job_id)

    def cancel(self, job_id: str) -> None:
        """Cancels the job that runs at its next tile."""
        self._cancelled.add(job_id)
        self.worker.cancel(job_id)

    async def check(self, *request: Any) -> list[str]:
        """Asks the worker whether a request can be served; see `WorkerProcess.check`.

        Returns:
            The names of the masks that it makes.

        Raises:
            HttpError: It cannot be served, status 422; or the worker starts, status 503.
        """
        for _ in range(2):
            try:
                await asyncio.wait_for(self._is_ready.wait(), _MOST_SECONDS_UNTIL_READY)
                answer = await self.worker.check(*request)
            except TimeoutError:
                continue
            except WorkerDied:
                # `run` starts another one; where no job runs, it waits for jobs and has not noticed.
                self._is_ready.clear()
                self._work.set()
                continue
            if answer["error"] is not None:
                raise HttpError(422, **answer["error"])
            return list(answer["names"])
        raise HttpError(503, "the worker starts again", hint="try again later", retry_s=30)

    async def run(self) -> None:
        """Takes jobs from the queue until the server stops."""
        while not self.stopping.is_set():
            if not self._is_ready.is_set():
                LOGGER.error("the worker ended while no job ran")
                await self._restart_worker()
                continue
            try:
                job = self._store.next_queued()
                is_started = job is not None and self._store.start(job.id)
            except sqlite3.Error as error:
                await self._records.pause_for_disk(error)
                continue
            if job is None:
                self._work.clear()
                await self._work.wait()
                continue
            if is_started and not await self._run(job):
                await self._restart_worker()

    async def _run(self, job: Job) -> bool:
        """Runs a job to its end, whatever happens; returns whether the worker still lives."""
        self.running = job.id
        self._records.notify(job.id)
        lives = True
        try:
            lives = await self._run_in_worker(job)
        except Exception as error:
            LOGGER.error("job %s failed by a bug: %s", job.id, place_of(error))
            body = error_body("this is a bug in mome", hint="see the server's log")
            await self._records.end_surely(job.id, "failed", error=body)
        self.running = None
        self._progress.pop(job.id, None)
        self._cancelled.discard(job.id)
        with disk_errors():  # what could not be removed now, `Retention` removes
            if self._store.get(job.id) is None:
                self._records.remove(job.id)
        return lives

    async def _run_in_worker(self, job: Job) -> bool:
        """Runs a job in the worker and stores how it ended; returns whether the worker still lives."""
        LOGGER.info("job %s runs", job.id)
        began = time.monotonic()

        def on_progress(progress: dict[str, Any]) -> None:
            self._progress[job.id] = progress
            self._records.notify(job.id)

        async def end(state: str, **found: Any) -> None:
            await self._records.end_surely(job.id, state, time.monotonic() - began, **found)

        if job.id in self._cancelled:
            await end("cancelled")
            return True
        folder, limit = self._records.folders.job(job.id), self._time_limit_s
        try:
            found = await asyncio.wait_for(self.worker.run(job.id, folder, job.request, on_progress), limit)
        except TimeoutError:
            self.worker.kill()
            hint = "a smaller scan; the server's option --time-limit"
            await end("failed", error=error_body(f"the job took longer than {limit:g} s", hint=hint))
            return False
        except WorkerDied as died:
            if job.id in self._cancelled:
                await end("cancelled")
            else:
                await end("failed", error=_death(died.code))
            return False
        if found["state"] == "cancelled" and job.id not in self._cancelled and self.stopping.is_set():
            self.put_back()
        else:
            await end(found["state"], error=found.get("error"), summary=found.get("summary"))
        return True

    def put_back(self) -> None:
        """Returns the job that runs to the queue, because the server stops; one that was cancelled ends."""
        if self.running in self._cancelled:
            self._records.end(self.running, "cancelled")
        elif self.running is not None and self._store.put_back(self.running):
            LOGGER.info("job %s returned to the queue: the server stops", self.running)

    async def _restart_worker(self) -> None:
        """Starts another worker, again and again with growing pauses."""
        self._is_ready.clear()
        pause = 0.0
        while not self.stopping.is_set():
            self._records.metrics.worker_restarts += 1
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


def _death(code: int | None) -> dict[str, Any]:
    """Returns the error of a job during which the worker ended."""
    if code == -9:
        return error_body(
            "the worker was killed while this job ran, most likely because the memory was not enough",
            hint="a smaller scan or fewer prompts",
        )
    return error_body(f"the worker ended with code {code} while this job ran", hint="is the scan damaged?")
