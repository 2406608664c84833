"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from mome.errors import InputError, OutputError


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # its folder may be a file, or gone
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def output_errors(path: str | Path, what: str, temporary: Path) -> Iterator[None]:
    """Turns a failure to write into an `OutputError` that names `path`; then removes what there is of `temporary`.

    Raises:
        OutputError: See above.
    """
    try:
        yield
    except BaseException as error:
        _remove(temporary)
        # safetensors reports a full disk by an exception of its own, torch.save by a RuntimeError
        disk = isinstance(error, OSError) or type(error).__module__.startswith("safetensors")
        disk = disk or isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error)
        if not disk or isinstance(error, OutputError):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        elsewhere = isinstance(error, OSError) and error.errno not in (
            None,
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EIO,
        )
        hint = "choose another folder" if elsewhere else "free some disk space, or another folder"
        raise OutputError(f"{what} could not be written: {reason}", where=str(path), hint=hint) from error


def check_output_folder(folder: str | Path) -> None:
    """Finds out before any work is done that a folder cannot be made or written.

    Raises:
        InputError: It, or what it would lie in, is a file or may not be written.
    """
    try:
        os.stat(folder)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            raise InputError(
                f"the output folder cannot be made: {error.strerror}", where=str(folder), hint="choose another folder"
            ) from error
    existing = next(path for path in (Path(folder), *Path(folder).absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(existing):
        raise InputError("the output folder is not a folder", where=str(existing), hint="choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError("the output folder may not be written", where=str(existing), hint="choose another folder")


@contextlib.contextmanager
def atomic_write(path: str | Path, what: str = "the file") -> Iterator[Path]:
    """A temporary path beside `path`, with its ending; moved there when the block ends well, removed when it fails.

    Args:
        path: A file or a folder; what stands there is replaced. Missing parents are made.
        what: Its name in the error, as in "the mask".

    Raises:
        OutputError: It cannot be written (a full disk, a read-only folder).
    """
    path = Path(path)
    ending = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    temporary = path.with_name(f".{secrets.token_hex(8)}.part{ending}")
    with output_errors(path, what, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir() and temporary.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
