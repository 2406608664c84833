"""A CSV or JSON file that lists cases wherever they are.

CSV columns, or keys of the objects in a JSON list: `image` and `labels` (paths, relative to the file's folder), and if
wanted `case`, `annotated` (names, in CSV separated by spaces or semicolons), `patient` and `split`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mome.data.case import Case
from mome.data.layouts.base import Layout, rules_of
from mome.errors import InputError, did_you_mean
from mome.labels import LabelMap
from mome.text_file import RepeatedKeyError, read_table, read_text, without_repeated_keys
from mome.volumes.scan_files import stem

_KEYS = ("image", "labels", "case", "annotated", "patient", "split")
_SPLITS = ("", "train", "val", "test")


class Manifest(Layout):
    """A CSV or JSON file with a row per case."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `manifest`.

        Args:
            split: Takes only the cases of this split; empty takes all.
        """

        split: str = ""

    shape: ClassVar[str] = "a .csv or .json file with image, labels and, if wanted, case, annotated, patient, split"

    def __init__(self, config: Config) -> None:
        if config.split not in _SPLITS:
            raise InputError(f"a split is train, val or test, got {config.split!r:.60}")
        self.split = config.split

    def cases(self, folder: Path, dataset: LabelMap | None) -> list[Case]:
        if dataset is None:
            raise InputError("layout 'manifest' needs a data set", where=str(folder), hint="dataset: lits")
        if not folder.is_file():
            raise InputError("layout 'manifest' takes a file", where=str(folder), hint="cases.csv or cases.json")
        rules = rules_of(dataset, folder)
        named, found, seen = frozenset(dataset.values), list[Case](), set[str]()
        for number, row in enumerate(_rows(folder), start=1):
            where = f"{folder}, case {number}"
            _check_keys(row, where)
            annotated = _annotated(row.get("annotated"), dataset, where)
            image, labels = (_path(row, key, folder.parent, where) for key in ("image", "labels"))
            name = _text(row, "case", where) or stem(image)
            if name in seen:
                raise InputError(f"two cases are named {name!r:.60}", where=where, hint="give them names in 'case'")
            seen.add(name)
            split = _text(row, "split", where)
            if split not in _SPLITS:
                raise InputError(f"a split is train, val or test, got {split!r:.60}", where=where)
            if self.split in ("", split):
                chosen = {structure: rules[structure] for structure in annotated}
                patient = _text(row, "patient", where)
                found.append(Case(name, image, labels, annotated, chosen, named, patient=patient, split=split))
        return found


def _rows(path: Path) -> Sequence[dict[str, Any]]:
    """Returns the rows of the file.

    Raises:
        InputError: It is no table, or no list of objects.
    """
    if path.suffix.lower() == ".csv":
        return read_table(path, "the list of cases")
    try:
        rows = json.loads(read_text(path, "the list of cases"), object_pairs_hook=without_repeated_keys)
    except RepeatedKeyError as error:
        raise InputError(f"a case has the key {error.args[0]!r:.80} twice", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise InputError("the list of cases is not valid JSON", where=str(path), hint=Manifest.shape) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError("the list of cases is no JSON list of objects", where=str(path), hint='[{"image": …}]')
    return rows


def _check_keys(row: dict[Any, Any], where: str) -> None:
    unknown = [str(key) for key in row if key not in _KEYS]
    if unknown:
        close = did_you_mean(unknown[0], _KEYS)
        raise InputError(f"unknown column {unknown[0]!r:.60}{close}", where=where, hint=", ".join(_KEYS))


def _path(row: dict[str, Any], key: str, folder: Path, where: str) -> Path:
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"the case has no path {key!r}", where=where, hint="image and labels are needed")
    path = folder / text.strip()
    if not path.exists():
        raise InputError(f"there is no file {text!r:.200}", where=where, hint="paths start at the list's folder")
    return path


def _text(row: dict[str, Any], key: str, where: str) -> str:
    """Returns a value that is a text, or a whole number as text; empty where there is none."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise InputError(f"{key!r} is a text, got {value!r:.60}", where=where, hint=f'"{key}": "s0011"')
    return str(value).strip()


def _annotated(given: Any, dataset: LabelMap, where: str) -> tuple[str, ...]:
    """Returns the structures that a case annotates.

    They are all of the data set where the key is missing, null or an empty cell. An empty list is none: what is not
    annotated must not become background.
    """
    if given is None or (isinstance(given, str) and not given.strip()):
        return dataset.annotated
    names = given.replace(";", " ").split() if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError("'annotated' is a list of names", where=where, hint="liver spleen")
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InputError(f"'annotated' lists {name!r:.60} twice", where=where, hint="each structure once")
        if name not in dataset.annotated:
            close = did_you_mean(name, dataset.annotated)
            raise InputError(f"the data set does not annotate {name!r:.60}{close}", where=where)
    return tuple(names)
