"""The report of a folder run, `report.json`: one entry per study, rewritten after each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mome.atomic import atomic_write
from mome.errors import InputError


def read_report(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the entries of an earlier run by study; an empty dict where there is no report.

    Raises:
        InputError: The file is not a report.
    """
    if not path.is_file():
        return {}
    try:
        return {entry["name"]: entry for entry in json.loads(path.read_text())["studies"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            "there is a report here that cannot be read", where=str(path), hint="move it away, or another folder"
        ) from error


def write_report(path: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Replaces the report.

    Raises:
        OutputError: The file cannot be written; the earlier report stays.
    """
    with atomic_write(path, "the report") as temporary:
        temporary.write_text(json.dumps({"studies": list(entries.values())}, indent=1) + "\n")


def is_complete(entry: dict[str, Any], folder: Path, request: dict[str, Any]) -> bool:
    """Says whether an earlier entry answers the same request and all its masks are in `folder`."""
    earlier = {"writer": "nifti", **entry}  # Reports from before there were other writers do not name one.
    same = all(earlier.get(key) == value for key, value in request.items())
    return same and entry.get("status") == "done" and all((folder / mask).is_file() for mask in entry["masks"])
