"""Writes files and folders completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mome.errors import InputError, OutputError
from mome.temporary_names import temporary_path


def _remove(path: Path) -> None:
    """Removes a file, a folder or a symbolic link if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # the folder around it may not exist, or be a file
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def output_errors(path: str | Path, what: str, temporary: Path | None = None) -> Iterator[None]:
    """Turns a failed write inside the block into an `OutputError`. After any error, `temporary` is removed.

    Args:
        path: The file or folder that the user asked for, named in the error.
        what: Its name in the error, as in "the mask".
        temporary: The path that the block writes to, if it is another one than `path`.

    Raises:
        OutputError: The disk is full, the folder is read-only, or the like.
    """
    try:
        yield
    except BaseException as error:
        if temporary is not None:
            _remove(temporary)
        if not _is_write_failure(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        # Libraries that report a full disk by their own exceptions give no error number.
        space = not isinstance(error, OSError) or error.errno in (None, *NO_SPACE)
        hint = "free some disk space, or choose another folder" if space else "choose another folder"
        raise OutputError(f"{what} could not be written: {reason}", where=str(path), hint=hint) from error


# The error numbers of a disk that is full or broken, of a quota that is used up, and of a file that is too large.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _is_write_failure(error: BaseException) -> bool:
    """Says whether the operating system refused a write; an `OutputError` was already translated."""
    if isinstance(error, OSError):
        return not isinstance(error, OutputError)
    # safetensors reports a full disk by its own exception, torch.save by a RuntimeError
    from_safetensors = type(error).__module__.startswith("safetensors")
    return from_safetensors or (isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error))


def check_output_folder(folder: str | Path) -> None:
    """Checks before any work is done that a folder can be created and written. Leaves nothing behind.

    Raises:
        InputError: The folder, or the existing folder it would lie in, is a file or may not be written.
    """
    hint = "choose another folder"
    try:
        os.stat(folder)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            raise InputError(
                f"the output folder cannot be made: {error.strerror}", where=str(folder), hint=hint
            ) from error
    existing = next(path for path in (Path(folder), *Path(folder).absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(existing):
        raise InputError("the output folder is not a folder", where=str(existing), hint=hint)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError("the output folder may not be written", where=str(existing), hint=hint)
    # Permissions say nothing of read-only mounts, of system folders, or of what a superuser may not do either.
    probe = temporary_path(existing / "probe")
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise InputError(
                f"the output folder may not be written: {error.strerror}", where=str(existing), hint=hint
            ) from error
    else:
        with contextlib.suppress(OSError):
            os.unlink(probe)


@contextlib.contextmanager
def atomic_write(path: str | Path, what: str = "the file") -> Iterator[Path]:
    """Gives a temporary path beside `path`, which is renamed to `path` when the block ends without an error.

    After an error the temporary file or folder is removed, and `path` stays as it was. After SIGKILL it stays until
    `mome.temporary_names.remove_stale_parts` finds it.

    Args:
        path: A file or a folder; an existing one is replaced. Missing parent folders are created.
        what: Its name in the error, as in "the mask".

    Yields:
        The temporary path. It has the ending of `path`, because some libraries choose a format by it.

    Raises:
        OutputError: It cannot be written (a full disk, a read-only folder).
    """
    path = Path(path)
    temporary = temporary_path(path)
    with output_errors(path, what, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir() and temporary.is_dir():
            _replace_folder(temporary, path)
        else:
            os.replace(temporary, path)


def _replace_folder(temporary: Path, path: Path) -> None:
    """Replaces a folder. The old one is moved away first: removing it may fail half way, and would take long.

    Of a symbolic link to a folder, the link is replaced, as that to a file is; what it leads to stays.
    """
    old = temporary_path(path)
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(old, path)
        raise
    _remove(old)
