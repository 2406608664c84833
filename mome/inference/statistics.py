"""Statistics of the masks of a scan as JSON, and those of all studies of a folder as one CSV table."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mome.atomic import atomic_write, output_errors
from mome.checksums import file_sha256
from mome.errors import InputError
from mome.inference.packed import PackedMasks
from mome.text_file import read_json
from mome.volumes import Volume
from mome.volumes.boxed import BoxedArray
from mome.volumes.statistics import structure_statistics

logger = logging.getLogger(__name__)

CSV_NAME = "statistics.csv"
_LONGEST_LINE = 2000
_NUMBERS = ("voxels", "volume_ml", "mean_hu", "median_hu", "sd_hu", "p5_hu", "p95_hu")
_COLUMNS = (
    *("study", "structure", *_NUMBERS),
    *(f"box_{axis}_{end}" for axis in "ijk" for end in ("first", "last")),
    *(f"box_{axis}_{end}_mm" for axis in "xyz" for end in ("low", "high")),
    *("touches", "pieces", "largest_piece_voxels"),
    *("voxels_in_map", "volume_ml_in_map"),  # empty where the masks were written as files of their own
)


def scan_statistics(masks: PackedMasks, volume: Volume) -> dict[str, dict[str, Any]]:
    """Returns the statistics of every mask; one mask is unpacked at a time, inside of its box.

    Args:
        masks: The masks.
        volume: The scan in HU, on the same grid.
    """
    found = {}
    for name in masks:
        i, j, k = (start for start, _ in masks.box(name))
        boxed = BoxedArray(volume.shape, (i, j, k), masks.crop(name))
        found[name] = structure_statistics(boxed, volume.array, volume.grid)
    return found


def statistics_name(scan: str) -> str:
    """Returns the name of the file for a scan, whose name `scan` is a part of file names."""
    return f"{scan}_statistics.json"


def write_statistics(
    path: Path, study: str, scan: dict[str, Any], statistics: dict[str, dict[str, Any]], masks: dict[str, Path]
) -> None:
    """Writes the statistics of one scan; those of masks of earlier runs stay in the file as long as their masks do.

    Every structure has the checksum of its mask in the file, so that numbers of a mask that was replaced are never
    taken for those of the new one. Where nothing is left to say, the file is removed.

    Args:
        path: The file, in the folder of the masks.
        study: The scan's name.
        scan: `mome.inference.fingerprint.scan_identity` of the scan.
        statistics: What was measured now; empty where nothing was.
        masks: Structure → the file of its mask, of every structure that was measured now.

    Raises:
        OutputError: The file cannot be written.
    """
    sums = _Sums(path.parent)
    structures = dict(statistics)
    files = {name: {"file": mask.name, "sha256": sums.of(mask.name)} for name, mask in masks.items()}
    content = _content(path)
    for name, found in content["structures"].items():
        mask = content["masks"].get(name)
        if name in structures:
            continue
        if content.get("scan") == scan and sums.are_of(mask):
            structures[name], files[name] = found, mask
        elif mask is None:
            logger.warning("%s is of an earlier version: its statistics of %s are left out", path.name, name)
    if structures:
        new = {"study": study, "scan": scan, "structures": structures, "masks": files}
        with atomic_write(path, "the statistics") as temporary:
            temporary.write_text(json.dumps(new, indent=1) + "\n")
    else:
        with output_errors(path, "the statistics"):
            path.unlink(missing_ok=True)


class _Sums:
    """Checksums of the files of a folder; each is read once, since one file may hold the masks of all structures."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._known = folder, dict[str, str]()

    def of(self, name: str) -> str:
        """Returns the checksum of a file; an empty text where there is none."""
        if name not in self._known:
            file = self._folder / Path(name).name
            self._known[name] = file_sha256(file) if file.is_file() else ""
        return self._known[name]

    def are_of(self, mask: Any) -> bool:
        """Says whether a mask lies in the folder as it was when it was measured; `mask` is what the file says of it."""
        if not isinstance(mask, dict) or not isinstance(mask.get("file"), str) or not mask.get("sha256"):
            return False
        return self.of(mask["file"]) == mask["sha256"]


def scan_of_statistics(path: Path) -> Any:
    """Returns the identity of the scan that a file of statistics is of; None where it does not say."""
    return _content(path).get("scan")


def _content(path: Path) -> dict[str, Any]:
    """Returns what a file of statistics holds; `structures` and `masks` are empty where it is missing or damaged."""
    try:
        content = read_json(path, "the statistics", hint="segment the scan again") if path.is_file() else {}
    except InputError:
        content = {}
    tables = {key: content[key] if isinstance(content.get(key), dict) else {} for key in ("structures", "masks")}
    return {**content, **tables}


def is_table(path: Path) -> bool:
    """Says whether a file is a table that `write_table` wrote."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return file.readline(_LONGEST_LINE).rstrip("\r\n") == ",".join(_COLUMNS)
    except (OSError, UnicodeDecodeError):
        return False


def write_table(folder: Path, files: Iterable[str]) -> None:
    """Writes `statistics.csv`: a row per study and structure, from the JSON files of the studies.

    Args:
        folder: The folder of the files and the table.
        files: Names of the JSON files. One that is missing or damaged is left out, with a warning, and so is a
            structure whose mask is no longer the one that was measured.

    Raises:
        OutputError: The table cannot be written.
    """
    with atomic_write(folder / CSV_NAME, "the table of statistics") as temporary:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(_COLUMNS)
            for name in files:
                table.writerows(_rows(folder / name))


def _rows(path: Path) -> list[list[Any]]:
    content, sums, rows = _content(path), _Sums(path.parent), []
    if not isinstance(content.get("study"), str):
        logger.warning("%s is missing or damaged: %s has no rows of this study", path.name, CSV_NAME)
        return []
    for name, found in content["structures"].items():
        # Files of earlier versions name no masks; each holds what the last run measured.
        if content["masks"] and not sums.are_of(content["masks"].get(name)):
            logger.warning("the mask of %s was changed or removed after it was measured: %s", name, path.name)
            continue
        try:
            rows.append(_row(content["study"], name, found))
        except (KeyError, TypeError, AttributeError):
            logger.warning("%s is damaged: %s has no row of %s", path.name, CSV_NAME, name)
    return rows


def _row(study: str, structure: str, found: dict[str, Any]) -> list[Any]:
    empty = [[None, None]] * 3
    ends = [end for axis in (found["box_voxels"] or empty) + (found["box_mm"] or empty) for end in axis]
    return [
        spreadsheet_text(study),
        spreadsheet_text(structure),
        *(found[name] for name in _NUMBERS),
        *ends,
        " ".join(found["touches"]),
        found["pieces"],
        found["largest_piece_voxels"],
        *(found.get(name) for name in ("voxels_in_map", "volume_ml_in_map")),
    ]


def spreadsheet_text(text: str) -> str:
    """Returns a text that a spreadsheet does not take for a formula, and that UTF-8 can hold.

    Names of files may hold bytes that the locale could not read: UTF-8 becomes text, other bytes escapes.
    """
    text = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return f"'{text}" if text[:1] in ("=", "+", "@", "-", "\t", "\r") else text
