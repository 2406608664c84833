"""`cases.json`, the list of what is annotated in each case: `{"<case>": {"annotated": ["liver", …]}, …}`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mome.errors import InputError
from mome.text_file import RepeatedKeyError, without_repeated_keys
from mome.volumes.open_file import open_regular

_SHAPE = 'the list of cases is not {case: {"annotated": [names]}}'
_MOST_BYTES = 256 << 20


def read_case_list(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Reads which structures are annotated in each case, in the order of the file.

    UTF-8, UTF-16 and UTF-32 are read, with and without a byte order mark.

    Returns:
        Case → names of its annotated structures.

    Raises:
        InputError: There is no such file, it is no JSON or of another shape, a case is listed twice, or the name of a
            case is a path.
    """
    path = Path(path)
    if not path.exists():
        raise InputError("no such list of cases", where=str(path))
    with open_regular(path) as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise InputError(f"{_SHAPE}: it has more than {_MOST_BYTES:,} bytes", where=str(path))
    try:
        listed = json.loads(data, object_pairs_hook=without_repeated_keys)
    except RepeatedKeyError as error:
        raise InputError(f"the list of cases has {error.args[0]!r:.80} twice", where=str(path)) from error
    except (ValueError, RecursionError) as error:  # ValueError includes bytes that are no text
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0][:120]
        raise InputError(f"{_SHAPE}; it is not valid JSON: {reason}", where=str(path)) from error
    if not isinstance(listed, dict):
        raise InputError(f"{_SHAPE}: it is no object in braces", where=str(path))
    return {name: _annotated(name, entry, path) for name, entry in listed.items()}


def _annotated(name: str, entry: Any, path: Path) -> tuple[str, ...]:
    if not name or name in (".", "..") or any(mark in name for mark in "/\\\0"):
        raise InputError(
            f"{name!r:.60} is not the name of a case: names are no paths",
            where=str(path),
            hint="cases are file names without folder and ending",
        )
    annotated = entry.get("annotated") if isinstance(entry, dict) else None
    if not isinstance(annotated, list) or not all(isinstance(label, str) for label in annotated):
        raise InputError(
            f"{_SHAPE}: case {name!r:.60} has no list 'annotated' of names",
            where=str(path),
            hint='write {"annotated": ["liver"]}, in brackets',
        )
    if len(set(annotated)) != len(annotated):
        raise InputError(f"case {name!r:.60} lists a structure twice", where=str(path), hint="list it once")
    return tuple(annotated)
