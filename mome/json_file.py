"""Reads the JSON files of a checkpoint, which may come from anybody: their type, size and depth are checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mome.errors import InputError
from mome.git_lfs import refuse_pointer

_MAX_BYTES = 64 * 2**20
_MAX_DEPTH = 64
_HINT = "copy or download it again"


def read_json_object(path: str | Path, where: str | Path | None = None) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
        path: The file.
        where: What the error names; the path if None.

    Raises:
        InputError: The file cannot be read, is larger than 64 MiB, is not JSON, nests more than 64 levels deep, or
            holds something else than an object.
    """
    path, where = Path(path), str(path if where is None else where)
    try:
        size = path.stat().st_size
        content = path.read_bytes() if path.is_file() and size <= _MAX_BYTES else b""
    except OSError as error:
        raise InputError(f"{path.name} cannot be read: {error.strerror}", where=where) from error
    if size > _MAX_BYTES:
        raise InputError(f"{path.name} has {size} bytes, the limit is {_MAX_BYTES}", where=where, hint=_HINT)
    refuse_pointer(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise InputError(f"{path.name} is not JSON that can be read: {reason}", where=where, hint=_HINT) from error
    return checked_object(value, path.name, where)


def checked_object(value: Any, name: str, where: str, hint: str = _HINT) -> dict[str, Any]:
    """Returns a value that was read from JSON if it is an object of at most 64 levels.

    Args:
        value: What was read.
        name: The file's name, for the error.
        where: The place, for the error.
        hint: What to do about it, for the error.

    Raises:
        InputError: It is of another type, or nests more deeply.
    """
    if not isinstance(value, dict):
        raise InputError(
            f"{name} holds a {type(value).__name__}, not an object of keys and values", where=where, hint=hint
        )
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, dict | list)
        ]
        if not level:
            return value
    raise InputError(f"{name} nests more than {_MAX_DEPTH} levels deep", where=where, hint=hint)
