"""Locks on folders, so that two processes do not change the same files at once.

The lock is the operating system's advisory lock on the folder itself: it leaves no file behind and ends with its
process, even after SIGKILL. File systems without such locks are used unlocked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def folder_lock(folder: str | Path, *, wait_s: float = 0.0) -> Iterator[bool]:
    """Holds the lock of an existing folder during the block.

    Args:
        folder: The folder.
        wait_s: Seconds to wait for another holder.

    Yields:
        False if another process still holds the lock after `wait_s`, else True.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield True
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield True
        return
    try:
        free, deadline = True, time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                free = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
                if not free and time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
            else:
                free = True
            break
        yield free
    finally:
        os.close(descriptor)
