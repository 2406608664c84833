"""BIDS: scans in `sub-*/[ses-*/]ct/`, label maps in `derivatives/<pipeline>/sub-*/…_dseg.nii.gz`.

The numbers are named by `<map>.tsv` beside a map, by a `dseg.tsv` above it, or by a data set. BIDS calls label maps
`dseg` and their tables have the columns `index` and `name` (BIDS specification, "Derivatives: imaging", segmentations).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mome.data.case import Case
from mome.data.layouts.base import Layout, rules_of, structure_name
from mome.errors import InputError
from mome.labels import LabelMap
from mome.labels.dataset import StructureRule
from mome.text_file import read_table
from mome.volumes.scan_files import is_nifti, stem


class Bids(Layout):
    """sub-*/ct/*_ct.nii.gz and derivatives/*/sub-*/…_dseg.nii.gz."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `bids`.

        Args:
            pipeline: The folder in `derivatives/` that holds the label maps; empty where there is one only.
        """

        pipeline: str = ""

    shape: ClassVar[str] = "sub-*/[ses-*/]ct/*_ct.nii.gz, derivatives/<pipeline>/sub-*/…_dseg.nii.gz"

    def __init__(self, config: Config) -> None:
        if config.pipeline and not re.fullmatch(r"[\w.-]+", config.pipeline):
            raise InputError(f"a pipeline is the name of a folder, got {config.pipeline!r:.60}")
        self.pipeline = config.pipeline

    def cases(self, folder: Path, dataset: LabelMap | None) -> list[Case]:
        root = self._derivatives(folder)
        scans = _by_key(path for path in sorted(folder.glob("sub-*/**/*.nii*")) if _suffix(path) in ("ct", "CT"))
        maps = _by_key(path for path in sorted(root.glob("sub-*/**/*_dseg.nii*")) if is_nifti(path))
        found = []
        for key, labels in maps.items():
            if key not in scans:
                raise InputError("a label map has no scan", where=str(labels), hint=f"sub-*/ct/{key}_ct.nii.gz")
            rules = rules_of(dataset, labels) if dataset else _rules(labels, root, self.own)
            named = frozenset(value for rule in rules.values() for value in rule.values)
            found.append(Case(key, scans[key], labels, tuple(rules), rules, named, patient=key.split("_")[0]))
        return found

    def _derivatives(self, folder: Path) -> Path:
        """Returns the folder of the pipeline.

        Raises:
            InputError: There is none, or several and none is chosen.
        """
        places = sorted(path for path in (folder / "derivatives").glob("*") if path.is_dir())
        chosen = [path for path in places if not self.pipeline or path.name == self.pipeline]
        if len(chosen) != 1:
            names = ", ".join(path.name for path in places) or "none"
            raise InputError(
                f"derivatives/ has the pipelines: {names}", where=str(folder), hint="bids(pipeline='name')"
            )
        return chosen[0]


def _by_key(paths: Iterable[Path]) -> dict[str, Path]:
    """Returns files by their keys; see `_key`.

    Raises:
        InputError: Two files have one key, so that scan and label map could be of different reconstructions.
    """
    found: dict[str, Path] = {}
    for path in paths:
        other = found.setdefault(_key(path), path)
        if other != path:
            raise InputError(
                f"two files differ by none of sub, ses, acq and run: {other.name} and {path.name}",
                where=str(path.parent),
                hint="keep one of them, or list the cases in a file: layout manifest",
            )
    return found


def _suffix(path: Path) -> str:
    return stem(path).rpartition("_")[2]


def _key(path: Path) -> str:
    """Returns subject, session and run of a file's name; other entities do not tell scans apart."""
    parts = [part for part in stem(path).split("_") if part.split("-")[0] in ("sub", "ses", "acq", "run")]
    return "_".join(parts)


def _rules(labels: Path, root: Path, own: Collection[str]) -> dict[str, StructureRule]:
    """Returns the rules of the table that belongs to a label map.

    Raises:
        InputError: There is no table, it has no columns `index` and `name`, or two rows name one structure.
    """
    beside = labels.with_name(f"{stem(labels)}.tsv")
    above = [parent / "dseg.tsv" for parent in labels.parents if parent == root or root in parent.parents]
    table = next((path for path in [beside, *above] if path.is_file()), None)
    if table is None:
        raise InputError(
            "no table names the numbers of a label map", where=str(labels), hint=f"{beside.name}, or a data set"
        )
    rows = read_table(table, "the table", delimiter="\t")
    rules: dict[str, StructureRule] = {}
    named: dict[int, str] = {}
    for row in rows:
        if not {"index", "name"} <= set(row) or not _is_index(row["index"]):
            raise InputError("the table has no columns 'index' (a whole number) and 'name'", where=str(table))
        if int(row["index"]) == 0:
            continue
        other = named.setdefault(int(row["index"]), row["name"] or "")
        if other != (row["name"] or ""):
            raise InputError(
                f"the table gives {other!r:.60} and {row['name']!r:.60} the number {int(row['index'])}",
                where=str(table),
                hint="each structure its own number",
            )
        structure = structure_name(str(row["name"] or "").replace("_", " "), table, own)
        if structure in rules:
            raise InputError(f"the table names {structure} twice", where=str(table), hint="name a data set instead")
        rules[structure] = StructureRule((int(row["index"]),))
    if not rules:
        raise InputError("the table names no structure", where=str(table), hint="a row per structure: index, name")
    return rules


def _is_index(text: str | None) -> bool:
    """Says whether a cell is a whole number of a label map."""
    digits = (text or "").strip()
    return digits.isdecimal() and len(digits) < 10
