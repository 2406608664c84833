"""Statistics of the masks of a scan as JSON, and those of all studies of a folder as one CSV table."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from mome.atomic import atomic_write
from mome.errors import InputError
from mome.inference.packed import PackedMasks
from mome.text_file import read_json
from mome.volumes import Volume
from mome.volumes.boxed import BoxedArray
from mome.volumes.statistics import structure_statistics

logger = logging.getLogger(__name__)

CSV_NAME = "statistics.csv"
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
    path: Path, study: str, statistics: dict[str, dict[str, Any]], earlier: Collection[str] = ()
) -> None:
    """Writes the statistics of one scan, and keeps those in the file of structures that were measured before.

    Args:
        path: The file.
        study: The scan's name.
        statistics: What was measured now.
        earlier: Names of the structures whose masks were written before and are still there.

    Raises:
        OutputError: The file cannot be written.
    """
    kept = set(earlier) - set(statistics)
    before = _structures_in(path) if kept and path.is_file() else {}
    statistics = {**statistics, **{name: found for name, found in before.items() if name in kept}}
    with atomic_write(path, "the statistics") as temporary:
        temporary.write_text(json.dumps({"study": study, "structures": statistics}, indent=1) + "\n")


def write_table(folder: Path, files: Iterable[str]) -> None:
    """Writes `statistics.csv`: a row per study and structure, from the JSON files of the studies.

    Args:
        folder: The folder of the files and the table.
        files: Names of the JSON files. One that is missing or damaged is left out, with a warning.

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
    try:
        content = read_json(path, "the statistics", hint="segment the scan again")
        return [_row(content["study"], name, found) for name, found in content["structures"].items()]
    except (InputError, KeyError, TypeError, AttributeError):
        logger.warning("%s is missing or damaged: %s has no rows of this study", path.name, CSV_NAME)
        return []


def _structures_in(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path, "the statistics", hint="segment the scan again").get("structures")
    except InputError:
        found = None
    if isinstance(found, dict):
        return found
    logger.warning("%s is damaged: the statistics of earlier masks are lost", path.name)
    return {}


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
