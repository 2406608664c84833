"""Names of mask files: `<scan>_<structure><ending>` per structure, or `<scan><ending>` for all of them.

This module writes these names and parses them. It knows no class table: callers pass the structures' names.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from mome.errors import InputError
from mome.volumes.scan_files import DICOM_ENDINGS

_LONGEST = 100


def file_part(text: str) -> str:
    """Returns a prompt or a scan's name as part of a file name: no separators, no leading dot, 100 characters at most.

    Raises:
        InputError: No usable character is left.
    """
    safe = safe_characters(text)[:_LONGEST]
    if not safe:
        raise InputError(f"{text!r} gives no file name", hint="use letters or digits")
    return safe


def safe_characters(text: str) -> str:
    """Returns a name in the characters that mask files have: letters, digits and `_.+-`, with accents composed.

    macOS writes an accented letter as two characters; composed, the same name is the same on every system.
    """
    composed = unicodedata.normalize("NFC", text)
    return re.sub(r"[^\w.+-]+", "_", composed.strip().replace(" ", "_")).strip("._")


def structure_parts(structures: Sequence[str]) -> list[str]:
    """Returns the parts of file names that stand for the structures, in their order.

    Raises:
        InputError: Two structures give one file name, or one gives none.
    """
    owners: dict[str, str] = {}
    for structure in structures:
        other = owners.setdefault(file_part(structure), structure)
        if other != structure:
            raise InputError(
                f"the prompts {other!r} and {structure!r} give the same file name",
                where=f"…_{file_part(structure)}",
                hint="word one of them differently",
            )
    return list(owners)


def mask_name(scan: str, structure: str | None, ending: str = ".nii.gz") -> str:
    """Returns the file name of a mask, or of the file of all structures where `structure` is None.

    Args:
        scan: The scan's name without its ending.
        structure: The structure's part of the name; see `structure_parts`.
        ending: Ending of the file, with its dot.
    """
    return f"{scan}{ending}" if structure is None else f"{scan}_{structure}{ending}"


def mask_paths(
    folder: str | Path, scan: str, structures: Sequence[str], *, ending: str = ".nii.gz", separate: bool = True
) -> list[Path]:
    """Returns the paths of a scan's masks.

    Args:
        folder: The folder of the masks.
        scan: The scan's name without its ending.
        structures: Names of the structures.
        ending: Ending of the files, with its dot.
        separate: One path per structure, else a single path.

    Raises:
        InputError: Two structures give one file name, or one gives none.
    """
    parts = structure_parts(structures)
    return [Path(folder) / mask_name(scan, part, ending) for part in (parts if separate else [None])]


def split_mask_name(name: str, structures: Sequence[str], scans: Sequence[str] = ()) -> tuple[str, str | None]:
    """Splits `<scan>_<structure>` into its two parts; the structure is None where `name` is a scan's name alone.

    A name that is one of `scans` is that scan. Otherwise the longest scan that `name` begins with owns it and the
    rest is the structure, known or not; without such a scan, the longest structure that `name` ends with is split off.

    Args:
        name: A file name without its ending.
        structures: Known names of structures.
        scans: Known names of scans.
    """
    if name in scans:
        return name, None
    structure = max((s for s in structures if name.endswith(f"_{s}")), key=len, default=None)
    scan = name if structure is None else name[: -len(structure) - 1]
    owner = max((known for known in scans if name.startswith(f"{known}_")), key=len, default=None)
    if owner is not None and scan not in scans:
        return owner, name[len(owner) + 1 :]
    return scan, structure


def check_different_names(scans: Iterable[tuple[str, Path]], hint: str = "rename one") -> None:
    """Checks that no two scans have masks of one name.

    Args:
        scans: (name, path) of each.
        hint: What to do about two of one name.

    Raises:
        InputError: Two names give one part of file names, or one gives none.
    """
    owners: dict[str, Path] = {}
    for name, path in scans:
        part = file_part(name)
        if part in owners:
            raise InputError(
                f"the masks of two scans would both be named {part!r}",
                where=f"{owners[part]} and {path}",
                hint=hint,
            )
        owners[part] = path


def refuse_to_overwrite(scans: Sequence[Path], masks: Sequence[Path]) -> None:
    """Checks that no mask would replace a scan, that none has the name of a folder, and that no DICOM object would lie
    among the slices of a scan: the folder would hold one more series, and could not be read as before.

    Raises:
        InputError: A path of `masks` is one of the scans, after symbolic links are followed, or a folder, or a DICOM
            file in the folder of a scan.
    """
    # `Path.resolve` raises an error for a circle of symbolic links.
    resolved = {os.path.realpath(scan) for scan in scans}
    for path in masks:
        if os.path.realpath(path) in resolved:
            raise InputError(
                "a mask would overwrite its scan", where=str(path), hint="choose another folder for the masks"
            )
        if path.suffix.lower() in DICOM_ENDINGS and os.path.realpath(path.parent) in resolved:
            raise InputError(
                "a DICOM object of masks would lie among the slices of its scan, as one more series",
                where=str(path),
                hint="choose another folder for the masks",
            )
        if path.is_dir():
            raise InputError(
                "a folder has the name of a mask, and is not replaced",
                where=str(path),
                hint="move the folder away, or choose another folder for the masks",
            )
