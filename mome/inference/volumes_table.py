"""`volumes.csv`: the volumes of all structures of all studies of a report, for statistics over a cohort."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mome.atomic import atomic_write
from mome.inference.earlier_runs import structures_of_earlier_runs
from mome.inference.report import read_report
from mome.inference.statistics import spreadsheet_text

_COLUMNS = ("study", "structure", "ml", "mean_hu")
_IN_MAP = "ml_in_map"


def write_volumes(folder: str | Path) -> Path:
    """Writes `<folder>/volumes.csv` from the report in a folder of masks.

    There is one row per study and structure: `study`, `structure`, `ml`, and `mean_hu`, which is empty where the report
    does not hold it. Both are of the whole mask. Where studies were written as maps of ids, the column `ml_in_map`
    follows: what the map holds of the structure, without the voxels that smaller structures cover. Studies stand in the
    order of their names. Masks of earlier runs that no later run replaced have rows, too; a run that failed has none.

    Returns:
        The file.

    Raises:
        InputError: The report cannot be read.
        OutputError: The file cannot be written; an earlier one stays.
    """
    folder = Path(folder)
    rows = _rows(read_report(folder / "report.json").values())
    path = folder / "volumes.csv"
    with atomic_write(path, "the table of volumes") as temporary:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            has_maps = any(row[-1] != "" for row in rows)
            table.writerow([*_COLUMNS, _IN_MAP] if has_maps else _COLUMNS)
            table.writerows(rows if has_maps else (row[:-1] for row in rows))
    return path


def _rows(entries: Iterable[dict[str, Any]]) -> list[list[Any]]:
    rows = []
    for entry in sorted(entries, key=lambda entry: str(entry["name"])):
        found = entry.get("structures") if entry.get("status") == "done" else []
        structures = [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
        now = {each.get("name") for each in structures}
        # Reports of earlier versions hold only the names of these.
        structures += [
            each for each in structures_of_earlier_runs(entry) if each.get("name") not in now and "volume_ml" in each
        ]
        for structure in structures:
            numbers = [structure.get(key) for key in ("volume_ml", "mean_hu", "volume_ml_in_map")]
            names = [spreadsheet_text(str(text)) for text in (entry["name"], structure.get("name"))]
            rows.append([*names, *("" if number is None else number for number in numbers)])
    return rows
