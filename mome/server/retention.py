"""Removes results and images when they were kept for as long as asked.

Times in the database are those of the system's clock, which a user or a time server may change. While the server runs,
stored times are moved with the clock, so that nothing is kept longer than asked or removed too early.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time

from mome.server.job_records import JobRecords
from mome.server.job_runner import JobRunner
from mome.server.kept_images import KeptImages
from mome.server.log import LOGGER

_LONGEST_PAUSE_S = 30.0
_SHORTEST_PAUSE_S = 0.05
_PAUSE_AFTER_ERROR_S = 1.0
# Clocks that a time server adjusts differ from the steady one by less (our choice).
_SMALLEST_JUMP_S = 1.0


class Retention:
    """Removes what is too old.

    Args:
        records: The jobs.
        images: The images.
        runner: The job that runs is not removed.
        keep_s: Seconds that ended jobs and unused images are kept.
    """

    def __init__(self, records: JobRecords, images: KeptImages, runner: JobRunner, keep_s: float) -> None:
        self._records, self._images, self._runner, self._keep_s = records, images, runner, keep_s
        self._offset = time.time() - steady_time()

    def start(self) -> None:
        """Prepares what an earlier server left: times that lie in the future would never pass."""
        self._records.store.limit_times(time.time())

    async def run(self) -> None:
        """Removes for ever."""
        while True:
            try:
                await asyncio.sleep(self._pause())
                self.follow_clock()
                await self._remove_before(time.time() - self._keep_s)
            except sqlite3.Error as error:  # as of a full disk, which must not end this task
                LOGGER.error("the queue cannot be written: %s", type(error).__name__)
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)

    def follow_clock(self) -> None:
        """Moves stored times where the system's clock was changed since the last call."""
        offset = time.time() - steady_time()
        jump = offset - self._offset
        if abs(jump) >= _SMALLEST_JUMP_S:
            LOGGER.warning("the system's clock was changed by %+.0f s", jump)
            self._records.store.move_times(jump)
            self._offset = offset

    def _pause(self) -> float:
        """Returns the seconds until something may be too old."""
        oldest = self._records.store.oldest()
        left = _LONGEST_PAUSE_S if oldest is None else oldest + self._keep_s - time.time()
        return min(_LONGEST_PAUSE_S, self._keep_s, max(_SHORTEST_PAUSE_S, left))

    async def _remove_before(self, before: float) -> None:
        store, folders = self._records.store, self._records.folders
        old = [job_id for job_id in store.to_remove(before) if job_id != self._runner.running]
        for job_id in old:
            await asyncio.to_thread(folders.remove, folders.job(job_id))
            self._records.notify(job_id)
        store.forget(old)
        for image_id in store.image_ids(before):
            self._images.remove(image_id)


def steady_time() -> float:
    """Returns seconds of a clock that nobody can set, and that goes on while the machine sleeps."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)  # Linux; elsewhere the monotonic clock goes on
    return time.monotonic() if clock is None else time.clock_gettime(clock)
