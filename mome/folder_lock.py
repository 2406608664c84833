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

_held: set[int] = set()  # descriptors of the folders that this process has locked


def _release_in_child() -> None:
    """Closes the locks that a fork inherits. Else a DataLoader's worker would hold them after its parent was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def keep_out_of_forks(descriptor: int) -> None:
    """Lets a fork close this descriptor; the lock on it belongs to this process. `close_descriptor` ends it."""
    _held.add(descriptor)


def close_descriptor(descriptor: int) -> None:
    """Closes a descriptor of `keep_out_of_forks`, unless a fork has closed it already."""
    if descriptor in _held:
        _held.remove(descriptor)
        os.close(descriptor)


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
    keep_out_of_forks(descriptor)
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
        close_descriptor(descriptor)
