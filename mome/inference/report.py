"""The report of a folder run, `report.json`: one entry per study, rewritten after each."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from mome.atomic import atomic_write, output_errors
from mome.checksums import file_sha256
from mome.errors import InputError, OutputError
from mome.folder_lock import folder_lock
from mome.inference.earlier_runs import with_earlier_runs
from mome.inference.problems import write_problems
from mome.text_file import read_json
from mome.volumes import read_label_map
from mome.volumes.dicom_out.earlier_objects import is_whole_object
from mome.volumes.scan_files import DICOM_ENDINGS, scan_ending

# Another process holds the lock while it writes the report, for less than a second where the disk answers.
_LOCK_WAIT_S = 300.0
_HINT = "move it away, or choose another folder"


class Report:
    """The report in an output folder. Several processes and threads may add entries to one report; none is lost.

    `problems.json` beside it is kept up to date (see `mome.inference.problems`).

    Args:
        path: The file; it is read if it is there.

    Attributes:
        entries: Study → entry, in the order of the file.

    Raises:
        InputError: The file is not a report.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        self._read_at: tuple[int, ...] | None = None
        self._lock = threading.RLock()
        self.refresh()

    def refresh(self) -> None:
        """Reads the entries again if another process has changed the file.

        Raises:
            InputError: The file is not a report.
        """
        with self._lock:
            version = self._version()
            if version != self._read_at:
                self.entries, self._read_at = read_report(self.path), version

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """Adds the entry of a study to the file, or replaces it; entries of other processes stay.

        `earlier` of the entry then lists what earlier runs of the study wrote and this one did not.

        Raises:
            OutputError: The file cannot be written, or another process keeps the folder locked; the earlier report
                stays.
        """
        with output_errors(self.path, "the report"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, folder_lock(self.path.parent, wait_s=_LOCK_WAIT_S) as is_ours:
            if not is_ours:  # without the lock, an entry that the other process writes would be lost
                raise OutputError(
                    f"the entry of {name!r} cannot be added to the report: another process has locked this folder for "
                    f"{_LOCK_WAIT_S:.0f} seconds",
                    where=str(self.path.parent),
                    hint="end that process (does one train here?), then run the same command with --resume",
                )
            self.refresh()
            self.entries[name] = with_earlier_runs(entry, self.entries.get(name))
            with atomic_write(self.path, "the report") as temporary:
                temporary.write_text(json.dumps({"studies": list(self.entries.values())}, indent=1) + "\n")
            self._read_at = self._version()
            write_problems(self.path.parent, self.entries.values())

    def _version(self) -> tuple[int, ...] | None:
        """Returns what changes when another process replaces the file; None where there is no file."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


def read_report(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the entries of an earlier run by study; an empty dict where there is no report.

    Raises:
        InputError: The file is not a report.
    """
    if not path.exists():
        return {}
    try:
        studies = read_json(path, "the report", hint=_HINT).get("studies")
    except InputError as error:
        reason = error.what.removeprefix("the report ")
        raise InputError(
            f"there is a report here that cannot be read: it {reason}", where=str(path), hint=_HINT
        ) from error
    if not isinstance(studies, list) or not all(_is_entry(entry) for entry in studies):
        raise InputError(
            "there is a report here that cannot be read: it does not list studies", where=str(path), hint=_HINT
        )
    return {entry["name"]: entry for entry in studies}


def changed_masks(entry: dict[str, Any], folder: Path) -> list[str]:
    """Returns the masks of an entry that are in `folder` and were changed after they were written.

    Reports of earlier versions hold no checksums; nothing is known of their masks.
    """
    masks: Any = entry.get("masks")
    if not _is_list_of(masks, str):
        return []
    return [mask for mask in masks if is_changed(entry, folder / Path(mask).name)]


def is_changed(entry: dict[str, Any], mask: Path) -> bool:
    """Says whether a mask of an entry is there and was changed after it was written; see `changed_masks`."""
    masks: Any = entry.get("masks")
    sums: Any = entry.get("mask_sha256")
    if not _is_list_of(masks, str) or not _is_list_of(sums, str) or len(sums) != len(masks):
        return False
    known = next((known for name, known in zip(masks, sums, strict=True) if Path(name).name == mask.name), None)
    return known is not None and mask.is_file() and file_sha256(mask) != known


def is_complete(entry: dict[str, Any], folder: Path, request: dict[str, Any]) -> bool:
    """Says whether an earlier entry answers the same request and all its masks are in `folder`.

    A mask of another size than it was written with counts where it can be read: somebody has corrected it.
    """
    earlier = {"writer": "nifti", **entry}  # Reports from before there were other writers do not name one.
    same = all(earlier.get(key) == value for key, value in request.items())
    if not same or entry.get("status") != "done" or not _is_finished(entry):
        return False
    sizes: Any = entry.get("mask_bytes")
    if not _is_list_of(sizes, int) or len(sizes) != len(entry["masks"]):  # an earlier version wrote the report
        sizes = [None] * len(entry["masks"])
    return all(is_whole(folder / mask, size) for mask, size in zip(entry["masks"], sizes, strict=True))


def is_whole(mask: Path, size: int | None = -1) -> bool:
    """Says whether a mask is there with the size that it was written with, or can be read.

    Args:
        mask: The file.
        size: The bytes that it was written with; None where they are not known, −1 to read it anyway.
    """
    if not mask.is_file():
        return False
    if size in (None, mask.stat().st_size):
        return True
    if mask.suffix.lower() in DICOM_ENDINGS:
        return is_whole_object(mask)
    try:
        return scan_ending(mask) is not None and read_label_map(mask).array is not None
    except InputError:
        return False


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str)


def _is_finished(entry: dict[str, Any]) -> bool:
    """Says whether an entry has what is printed of a finished study; a report of another program may lack it."""
    masks: Any = entry.get("masks")
    structures: Any = entry.get("structures")
    return (
        _is_list_of(masks, str)
        and all(Path(mask).name == mask for mask in masks)  # the name of a file in the folder, never a path
        and _is_list_of(entry.get("notes"), str)
        and _is_list_of(structures, dict)
        and all(_is_structure(structure) for structure in structures)
        and isinstance(entry.get("seconds"), int | float)
        and isinstance(entry.get("overlapping_voxels"), int | None)
    )


def _is_structure(structure: dict[str, Any]) -> bool:
    return (
        isinstance(structure.get("name"), str)
        and isinstance(structure.get("volume_ml"), int | float)
        and isinstance(structure.get("volume_ml_in_map"), int | float | None)
        and isinstance(structure.get("warning"), str | None)
    )


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
