"""The jobs in SQLite, so that a server that was killed goes on with its queue."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mome.errors import InputError

_VERSION = 1
_SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled')),
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL,
    request TEXT NOT NULL,
    error TEXT,
    summary TEXT,
    deleted INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX jobs_by_state ON jobs (state, number);
CREATE TABLE images (
    id TEXT NOT NULL UNIQUE,
    created REAL NOT NULL,
    used REAL NOT NULL,
    bytes INTEGER NOT NULL,
    source TEXT NOT NULL
);
"""
ENDED = ("done", "failed", "cancelled")
# A job during which the server was killed this often is failed: it may be what kills the server.
MOST_ATTEMPTS = 2


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        id: A random UUID.
        state: `queued`, `running`, `done`, `failed` or `cancelled`.
        created: When it was accepted, in seconds since 1970.
        started: When it last began to run.
        finished: When it ended.
        attempts: How often it began to run; a return to the queue at a graceful stop does not count.
        bytes: Size of the upload.
        request: `source`, `prompts`, `outputs` and `options`.
        error: `what`, `where` and `hint` of a failed job.
        summary: `structures`, `notes`, `seconds` and `formats` of a job that is done.
    """

    id: str
    state: str
    created: float
    started: float | None
    finished: float | None
    attempts: int
    bytes: int
    request: dict[str, Any]
    error: dict[str, Any] | None
    summary: dict[str, Any] | None


@dataclass(frozen=True)
class Image:
    """An image that was uploaded for later jobs.

    Attributes:
        id: A random UUID.
        created: When it was uploaded, in seconds since 1970.
        used: When a job last took it.
        bytes: Its size.
        source: Its file or folder inside `input/`.
    """

    id: str
    created: float
    used: float
    bytes: int
    source: str


class Store:
    """The database. Its methods are called from one thread.

    Deleted rows are overwritten with zeros (`secure_delete`), because prompts may hold what a user typed.

    Args:
        path: The file; it is created where there is none.

    Raises:
        InputError: The file is no database of this version.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "busy_timeout=5000"):
                self._db.execute(f"PRAGMA {pragma}")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_VERSION}; COMMIT;")
            elif version != _VERSION:
                raise InputError(
                    f"the queue was written by another version of mome ({version})",
                    where=str(path),
                    hint="give another --data folder",
                )
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"the queue cannot be read: {error}", where=str(path), hint="give another --data folder"
            ) from error

    def close(self) -> None:
        """Writes the journal into the database and closes it."""
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.close()

    def add(self, job_id: str, request: dict[str, Any], size: int) -> None:
        """Appends a job to the queue."""
        self._db.execute(
            "INSERT INTO jobs (id, state, created, bytes, request) VALUES (?, 'queued', ?, ?, ?)",
            (job_id, time.time(), size, json.dumps(request)),
        )

    def get(self, job_id: str) -> Job | None:
        """Returns a job; None where there is none or it was deleted."""
        row = self._db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id = ? AND deleted = 0", (job_id,)).fetchone()
        return None if row is None else _job(row)

    def next_queued(self) -> Job | None:
        """Returns the job that has waited longest."""
        row = self._db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE state = 'queued' ORDER BY number LIMIT 1").fetchone()
        return None if row is None else _job(row)

    def start(self, job_id: str) -> bool:
        """Marks a queued job as running; False if it is not queued any more."""
        return self._changed(
            "UPDATE jobs SET state = 'running', started = ?, attempts = attempts + 1 WHERE id = ? AND state = 'queued'",
            (time.time(), job_id),
        )

    def put_back(self, job_id: str) -> bool:
        """Returns a running job to its place in the queue, without counting the attempt."""
        return self._changed(
            "UPDATE jobs SET state = 'queued', started = NULL, attempts = attempts - 1 "
            "WHERE id = ? AND state = 'running'",
            (job_id,),
        )

    def finish(
        self,
        job_id: str,
        state: str,
        *,
        error: dict[str, Any] | None = None,
        summary: dict[str, Any] | None = None,
    ) -> bool:
        """Ends a job; False if it has ended before."""
        return self._changed(
            "UPDATE jobs SET state = ?, finished = ?, error = ?, summary = ? "
            "WHERE id = ? AND state IN ('queued', 'running')",
            (state, time.time(), _dumped(error), _dumped(summary), job_id),
        )

    def hide(self, job_id: str) -> None:
        """Marks a job as deleted; `forget` removes it when its files are gone."""
        self._db.execute("UPDATE jobs SET deleted = 1 WHERE id = ?", (job_id,))

    def forget(self, job_ids: Sequence[str]) -> None:
        """Removes jobs from the database, and what the journal still holds of them."""
        if job_ids:
            self._db.executemany("DELETE FROM jobs WHERE id = ?", [(job_id,) for job_id in job_ids])
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def to_remove(self, before: float) -> list[str]:
        """Returns the ended jobs that were deleted, or that ended before a time."""
        rows = self._db.execute(
            "SELECT id FROM jobs WHERE finished IS NOT NULL AND (deleted = 1 OR finished < ?)", (before,)
        )
        return [row[0] for row in rows]

    def oldest(self) -> float | None:
        """Returns the earliest time at which a job ended or an image was used; None where there is none."""
        return self._db.execute(
            "SELECT MIN(at) FROM (SELECT MIN(finished) AS at FROM jobs WHERE deleted = 0 "
            "UNION ALL SELECT MIN(used) FROM images)"
        ).fetchone()[0]

    def move_times(self, seconds: float) -> None:
        """Moves all times, as the system's clock was moved."""
        self._db.execute(
            "UPDATE jobs SET created = created + ?, started = started + ?, finished = finished + ?", (seconds,) * 3
        )
        self._db.execute("UPDATE images SET created = created + ?, used = used + ?", (seconds,) * 2)

    def limit_times(self, latest: float) -> None:
        """Replaces times after `latest`, which a clock that was wrong has left."""
        self._db.execute("UPDATE jobs SET finished = ? WHERE finished > ?", (latest, latest))
        self._db.execute("UPDATE images SET used = ? WHERE used > ?", (latest, latest))

    def recover(self) -> tuple[list[str], list[str]]:
        """Deals with jobs that ran when the server ended: they return to the queue, or fail at the second time.

        Returns:
            The jobs that returned to the queue, and those that failed.
        """
        self._db.execute(
            "UPDATE jobs SET state = 'cancelled', finished = ? WHERE deleted = 1 AND state IN ('queued', 'running')",
            (time.time(),),
        )
        rows = self._db.execute("SELECT id, attempts FROM jobs WHERE state = 'running'").fetchall()
        failed = [job_id for job_id, attempts in rows if attempts >= MOST_ATTEMPTS]
        for job_id in failed:
            self.finish(
                job_id,
                "failed",
                error={
                    "what": f"the server ended {MOST_ATTEMPTS} times while this job ran",
                    "where": None,
                    "hint": "is the scan too large for the server's memory?",
                },
            )
        self._db.execute("UPDATE jobs SET state = 'queued', started = NULL WHERE state = 'running'")
        return [job_id for job_id, _ in rows if job_id not in failed], failed

    def counts(self) -> dict[str, int]:
        """Returns the number of jobs by state."""
        rows = self._db.execute("SELECT state, COUNT(*) FROM jobs WHERE deleted = 0 GROUP BY state")
        return {"queued": 0, "running": 0, "done": 0, "failed": 0, "cancelled": 0, **dict(rows.fetchall())}

    def position(self, job_id: str) -> int | None:
        """Returns the number of jobs that run before a queued job; None for another."""
        row = self._db.execute("SELECT number FROM jobs WHERE id = ? AND state = 'queued'", (job_id,)).fetchone()
        if row is None:
            return None
        return int(
            self._db.execute("SELECT COUNT(*) FROM jobs WHERE state = 'queued' AND number < ?", row).fetchone()[0]
        )

    def ids(self) -> list[str]:
        """Returns the ids of all jobs, deleted ones included."""
        return [row[0] for row in self._db.execute("SELECT id FROM jobs")]

    def deleted_ids(self) -> list[str]:
        """Returns the ids of jobs that were deleted, and whose files may still be there."""
        return [row[0] for row in self._db.execute("SELECT id FROM jobs WHERE deleted = 1")]

    def add_image(self, image_id: str, source: str, size: int) -> None:
        """Stores an uploaded image."""
        now = time.time()
        self._db.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?)", (image_id, now, now, size, source))

    def image(self, image_id: str, *, use: bool = False) -> Image | None:
        """Returns an uploaded image; None where there is none.

        Args:
            image_id: Its id.
            use: Begin its time to live anew.
        """
        if use:
            self._db.execute("UPDATE images SET used = ? WHERE id = ?", (time.time(), image_id))
        row = self._db.execute(
            "SELECT id, created, used, bytes, source FROM images WHERE id = ?", (image_id,)
        ).fetchone()
        return None if row is None else Image(*row)

    def image_ids(self, before: float | None = None) -> list[str]:
        """Returns the ids of all images, or of those that were last used before a time."""
        limit = float("inf") if before is None else before
        return [row[0] for row in self._db.execute("SELECT id FROM images WHERE used < ?", (limit,))]

    def forget_image(self, image_id: str) -> bool:
        """Removes an image from the database; False where there is none."""
        return self._changed("DELETE FROM images WHERE id = ?", (image_id,))

    def _changed(self, statement: str, values: tuple[Any, ...]) -> bool:
        return self._db.execute(statement, values).rowcount == 1


_COLUMNS = "id, state, created, started, finished, attempts, bytes, request, error, summary"


def _job(row: tuple[Any, ...]) -> Job:
    found = dict(zip(_COLUMNS.split(", "), row, strict=True))
    for name in ("request", "error", "summary"):
        found[name] = None if found[name] is None else json.loads(found[name])
    return Job(**found)


def _dumped(value: dict[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(value)
