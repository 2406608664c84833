"""Ends and removes jobs, so that database, files, counters, log and the waiting clients agree."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Iterator
from typing import Any

from mome.server.folders import Folders
from mome.server.log import LOGGER
from mome.server.metrics import Metrics
from mome.server.store import Store

_DISK_PAUSE_S = 5.0


class JobRecords:
    """What is known and kept of the jobs.

    Args:
        folders: The server's folder.
        store: The database.
        metrics: Counters.
    """

    def __init__(self, folders: Folders, store: Store, metrics: Metrics) -> None:
        self.folders, self.store, self.metrics = folders, store, metrics
        self._signals: dict[str, asyncio.Event] = {}

    def signal(self, job_id: str) -> asyncio.Event:
        """Returns the event that is set at the next change of a job."""
        return self._signals.setdefault(job_id, asyncio.Event())

    def notify(self, job_id: str) -> None:
        """Says that a job has changed."""
        event = self._signals.pop(job_id, None)
        if event is not None:
            event.set()

    def notify_all(self) -> None:
        """Wakes everybody who waits for a change."""
        for event in self._signals.values():
            event.set()

    def end(self, job_id: str, state: str, seconds: float = 0.0, **found: Any) -> None:
        """Stores the end of a job; its scan is not needed any more.

        Args:
            job_id: The job.
            state: `done`, `failed` or `cancelled`.
            seconds: How long it ran.
            found: Its `error` or its `summary`.
        """
        if self.store.finish(job_id, state, **found):
            self.metrics.ended[state] += 1
            if state == "done":
                self.metrics.job_seconds += seconds
            LOGGER.info("job %s %s, %.1f s", job_id, state, seconds)
        self.remove_files(job_id, state)
        self.notify(job_id)

    async def end_surely(self, job_id: str, state: str, seconds: float = 0.0, **found: Any) -> None:
        """Stores the end of a job, again and again while the disk is full; the job's scan is removed before."""
        self.folders.remove(self.folders.job(job_id) / "input")
        while True:
            try:
                self.end(job_id, state, seconds, **found)
                return
            except sqlite3.Error as error:
                await self.pause_for_disk(error)

    async def pause_for_disk(self, error: sqlite3.Error) -> None:
        """Waits before the database is written again."""
        LOGGER.error("the queue cannot be written: %s", type(error).__name__)
        await asyncio.sleep(_DISK_PAUSE_S)

    def remove_files(self, job_id: str, state: str) -> None:
        """Removes what an ended job does not need: its scan, and results where it is not done."""
        self.folders.remove(self.folders.job(job_id) / "input")
        if state != "done":
            self.folders.remove(self.folders.job(job_id) / "result")

    def remove(self, job_id: str) -> None:
        """Removes a job and all its files."""
        self.folders.remove(self.folders.job(job_id))
        self.store.forget([job_id])


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Logs errors of the database, as of a full disk, which must not end the task that runs or removes jobs."""
    try:
        yield
    except sqlite3.Error as error:
        LOGGER.error("the queue cannot be written: %s", type(error).__name__)
