"""Recognises pointer files of Git LFS: a clone without `git lfs pull` has them in place of the large files."""

from __future__ import annotations

from pathlib import Path

from mome.errors import InputError

# Every pointer begins with this line (git-lfs specification, version 1).
POINTER_START = b"version https://git-lfs.github.com/spec/"
_MOST_BYTES = 1024  # the specification's limit of a pointer


def refuse_pointer(path: str | Path) -> None:
    """Checks that a file is itself there, and not only its pointer.

    Raises:
        InputError: The file is a pointer.
    """
    path = Path(path)
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return
        with path.open("rb") as file:
            is_pointer = file.read(len(POINTER_START)) == POINTER_START
    except OSError:
        return  # reading the file raises the error in its own words
    if is_pointer:
        raise InputError(
            "this is a pointer of Git LFS, the file itself was not downloaded", where=str(path), hint="git lfs pull"
        )
