"""The server's folder: the database, unfinished uploads, jobs and uploaded images. No name in it comes from a client.

jobs.sqlite3            the queue
uploads/<uuid>/         an upload that is not finished
jobs/<uuid>/input/      the scan of a job, until the job ends
jobs/<uuid>/result/     its results, one file per format
images/<uuid>/input/    an image that was uploaded for later jobs (MONAI Label)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from mome.atomic import check_output_folder
from mome.errors import InputError
from mome.folder_lock import folder_lock
from mome.server.http_errors import HttpError
from mome.server.log import LOGGER
from mome.temporary_names import temporary_folder


class Folders:
    """Paths inside the server's folder.

    Args:
        root: The folder; it is created, and its parts are readable by this user only.
        free_bytes: Bytes of the disk that uploads leave free.
    """

    def __init__(self, root: Path, free_bytes: int) -> None:
        self.root, self._free_bytes = root, free_bytes
        self.database = root / "jobs.sqlite3"
        for name in ("uploads", "jobs", "images"):
            (root / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def new_upload(self) -> tuple[str, Path]:
        """Creates the folder of an upload and returns its id and its path.

        Raises:
            HttpError: The folder cannot be written; status 507.
        """
        upload_id = str(uuid.uuid4())
        path = self.root / "uploads" / upload_id
        try:
            (path / "input").mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise HttpError(507, "the upload cannot be written: the server's disk is full or broken") from error
        return upload_id, path

    def job(self, job_id: str) -> Path:
        """Returns the folder of a job."""
        return self.root / "jobs" / str(uuid.UUID(job_id))

    def image(self, image_id: str) -> Path:
        """Returns the folder of an uploaded image."""
        return self.root / "images" / str(uuid.UUID(image_id))

    def check_space(self, needed: int = 0) -> None:
        """Checks that the disk has room for more bytes.

        Raises:
            HttpError: It has not; status 507.
        """
        if shutil.disk_usage(self.root).free - needed < self._free_bytes:
            raise HttpError(507, "the server's disk is nearly full", hint="try again later", retry_s=60)

    def remove(self, path: Path) -> None:
        """Removes a folder and what is in it. What cannot be removed is logged, because it may be of a patient."""
        shutil.rmtree(path, ignore_errors=True)
        if os.path.lexists(path):
            LOGGER.error("%s could not be removed", path.relative_to(self.root))

    def remove_leftovers(self, jobs: set[str], images: set[str]) -> int:
        """Removes unfinished uploads, and folders of jobs and images that the database does not know.

        Returns:
            The number of folders that were removed.
        """
        removed = 0
        for name, known in (("uploads", set[str]()), ("jobs", jobs), ("images", images)):
            for path in (self.root / name).iterdir():
                if path.name not in known:
                    self.remove(path)
                    removed += 1
        return removed


@contextlib.contextmanager
def data_folder(given: Path | None) -> Iterator[Path]:
    """Yields the server's folder, locked against a second server.

    Args:
        given: The user's folder; None for a temporary one of mode 0700, which is removed at the end. One that a killed
            server has left is removed too.

    Raises:
        InputError: The folder cannot be written, others may read it, or another server uses it.
    """
    if given is None:
        with temporary_folder() as root:
            yield root
        return
    check_output_folder(given)
    existed = given.exists()
    given.mkdir(mode=0o700, parents=True, exist_ok=True)
    if existed and os.name == "posix" and given.stat().st_mode & 0o077:
        raise InputError("other users may read the folder of --data", where=str(given), hint=f"chmod 700 {given}")
    with folder_lock(given) as free:
        if not free:
            raise InputError(
                "another server uses this folder", where=str(given), hint="give each server a --data folder of its own"
            )
        yield given
