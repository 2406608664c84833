"""`problems.json`: the studies of a report that failed or should be looked at, with the reason and what to do."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mome.atomic import atomic_write

PROBLEMS_FILE = "problems.json"
_LOOK = "look at the scan and its masks"


def problems_of(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one entry per study that failed or is doubtful; what a later run mended is not among them.

    A study is doubtful where its entry has `doubts`: notes of the reader, and masks that fill the scan. Notes on the
    model, on prompts and on what post-processing changed make none doubtful.

    Args:
        entries: The entries of a report.

    Returns:
        Entries of `name`, `status` (`failed` or `doubtful`), `phase` (`read`, `resample`, `network` or `write`; None
        where it is not known), `reasons` and `remedy`.
    """
    return [problem for entry in entries if (problem := _problem(entry)) is not None]


def write_problems(folder: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Writes `problems.json` beside a report, or removes it where there are no problems.

    Raises:
        OutputError: It cannot be written.
    """
    path, problems = folder / PROBLEMS_FILE, problems_of(entries)
    if not problems:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return
    with atomic_write(path, "the list of problems") as temporary:
        temporary.write_text(json.dumps({"problems": problems}, indent=1) + "\n")


def _problem(entry: dict[str, Any]) -> dict[str, Any] | None:
    name = entry.get("name")
    if entry.get("status") == "failed":
        failure = entry.get("failure")
        failure = failure if isinstance(failure, dict) else {}
        return {
            "name": name,
            "status": "failed",
            "phase": failure.get("phase"),
            "reasons": [failure.get("reason") or str(entry.get("error"))],
            "remedy": failure.get("remedy"),
        }
    doubts = entry.get("doubts")
    if isinstance(doubts, list) and doubts:
        return {"name": name, "status": "doubtful", "phase": None, "reasons": doubts, "remedy": _LOOK}
    return None
