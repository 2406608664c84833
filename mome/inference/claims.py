"""Claims on studies, so that of several processes which share an output folder only one segments each study.

A claim is the operating system's advisory lock on a small hidden file. It ends with its process, even after SIGKILL, so
that a study of a killed process can be claimed by another one. On file systems without such locks every claim is
granted: the results are the same, and a study may be segmented twice.

Runs that do not share the studies claim each study while they write it, under another ending.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from mome.atomic import output_errors
from mome.errors import OutputError
from mome.folder_lock import close_descriptor, keep_out_of_forks
from mome.volumes.mask_names import file_part

TO_SEGMENT, TO_WRITE = ".claim", ".writing"
# Another run writes the masks of one study in seconds, where the disk answers.
WRITE_WAIT_S = 300.0
# How often a claim that another holder has is asked for.
_POLL_S = 0.1


class Claims:
    """The claims of this process in one output folder.

    Args:
        folder: The output folder; it is made with the first claim.
        ending: `TO_SEGMENT` or `TO_WRITE`; claims of one do not exclude those of the other.
    """

    def __init__(self, folder: Path, ending: str = TO_SEGMENT) -> None:
        self._folder, self._ending = folder, ending
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

    @contextlib.contextmanager
    def held(self, study: str, wait_s: float) -> Iterator[None]:
        """Holds the claim of a study during the block.

        Args:
            study: The study.
            wait_s: Seconds to wait for another holder.

        Raises:
            OutputError: The folder cannot be written, or another run still holds the claim after `wait_s`.
        """
        deadline = time.monotonic() + wait_s
        while not self.take(study):
            if time.monotonic() > deadline:
                raise OutputError(
                    f"another run has been writing {study!r:.60} into this folder for {wait_s:.0f} seconds",
                    where=str(self._folder),
                    hint="end that process, then run the same command with --resume",
                )
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            self.release(study)

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
        for path in self._folder.glob(f".*{self._ending}"):
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDWR)
                try:
                    if _lock(descriptor) and _is_file_of(path, descriptor):
                        os.unlink(path)
                finally:
                    os.close(descriptor)

    def _path(self, study: str) -> Path:
        return self._folder / f".{file_part(study)}{self._ending}"


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
