"""Claims on studies, so that of several processes which share an output folder only one segments each study.

A claim is the operating system's advisory lock on a small hidden file. It ends with its process, even after SIGKILL, so
that a study of a killed process can be claimed by another one. On file systems without such locks every claim is
granted: the results are the same, and a study may be segmented twice.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from mome.atomic import output_errors
from mome.folder_lock import close_descriptor, keep_out_of_forks
from mome.volumes.mask_names import file_part

_ENDING = ".claim"


class Claims:
    """The claims of this process in one output folder.

    Args:
        folder: The output folder; it is made with the first claim.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, int] = {}

    def take(self, study: str) -> bool:
        """Claims a study; False where another process holds it.

        Raises:
            OutputError: The folder cannot be written.
        """
        path = self._path(study)
        while True:
            with output_errors(path, "the claim of a study"):
                self._folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            if not _lock(descriptor):
                os.close(descriptor)
                return False
            if _is_file_of(path, descriptor):
                keep_out_of_forks(descriptor)
                self._held[study] = descriptor
                return True
            os.close(descriptor)  # its holder removed the file between the opening and the lock

    def release(self, study: str) -> None:
        """Ends a claim and removes its file, which `take` of another process notices."""
        descriptor = self._held.pop(study, None)
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path(study))
            close_descriptor(descriptor)

    def release_all(self) -> None:
        """Ends all claims of this process."""
        for study in list(self._held):
            self.release(study)

    def remove_stale(self) -> None:
        """Removes the files of claims whose processes have ended, as after SIGKILL."""
        for path in self._folder.glob(f".*{_ENDING}"):
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDWR)
                try:
                    if _lock(descriptor) and _is_file_of(path, descriptor):
                        os.unlink(path)
                finally:
                    os.close(descriptor)

    def _path(self, study: str) -> Path:
        return self._folder / f".{file_part(study)}{_ENDING}"


def _lock(descriptor: int) -> bool:
    """Locks a file without waiting; False where another holder has it."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _is_file_of(path: Path, descriptor: int) -> bool:
    """Says whether a descriptor is that of the file which now has this path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False
