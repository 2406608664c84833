"""Opens files that a user or a header names: regular files only, and data files only beside their header."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from mome.errors import InputError

_LONGEST_NAME = 255


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading.

    A pipe would block for ever and a device may never end, so both are refused without reading from them.

    Raises:
        InputError: The file is missing, may not be read, or is not a regular file.
    """
    try:
        # O_NONBLOCK makes the opening of a pipe return at once; it has no effect on regular files.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # ValueError for a path with a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"the file cannot be opened: {reason}", where=str(path), hint="check the path") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(
            "this is not a regular file", where=str(path), hint="give a file; pipes, sockets and devices are not read"
        )
    return os.fdopen(descriptor, "rb")


def beside(header: str | Path, name: str) -> Path:
    """Returns the path of a data file that a header names.

    Raises:
        InputError: The name is empty, too long or holds control characters; or the file lies outside the header's
            folder (an absolute path, `..`, or a symbolic link that leads out), because a header from elsewhere must not
            choose which files are read.
    """
    header = Path(header)
    if not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise InputError(
            f"the header names no data file: {name[:60]!r}", where=str(header), hint="write the scan again, as .nii.gz"
        )
    path, named = header.parent / name, Path(name)
    inside = not named.is_absolute() and ".." not in named.parts
    if not inside or not _is_inside(path, header.parent):
        raise InputError(
            f"the header names a data file outside its own folder: {name[:100]!r}",
            where=str(header),
            hint="put the data file beside the header, and name it there without a path",
        )
    return path


def _is_inside(path: Path, folder: Path) -> bool:
    """Says whether a path lies in a folder after symbolic links are followed."""
    real, base = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([real, base]) == base
