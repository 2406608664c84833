"""What the label maps of public data sets mean: one YAML file per data set in `datasets/`.

A file says how to cite and get the data, under which licence, and which values of a label map make up each structure. A
structure that the file does not list is unknown in that data set, not background.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from mome.errors import InputError, did_you_mean
from mome.labels.table import load_table

_FOLDER = Path(__file__).parent / "datasets"
_SIDES = ("left", "right")
TEXTS = ("name", "citation", "licence", "get", "layout", "source")


@dataclass(frozen=True)
class StructureRule:
    """Which values of a label map make up a structure.

    Attributes:
        values: Their union is the structure; an organ that includes its tumour lists both.
        side: `left` or `right` where the values stand for both sides of a pair; `mome.volumes.sides` tells them apart.
            None where the values stand for this structure alone.
    """

    values: tuple[int, ...]
    side: str | None = None


@dataclass(frozen=True)
class LabelMap:
    """One data set.

    Attributes:
        name: The data set's name.
        citation: Its publication.
        licence: The terms of use of the data.
        get: The page that it is downloaded from.
        layout: How its folders are laid out, a name of `mome.data.layouts`.
        source: Where the numbers come from.
        structures: Structure → the values of label maps that make it up. Only these structures are annotated.
        files: Structure → patterns of the names of its mask files, for data sets with a file per structure.
    """

    name: str
    citation: str
    licence: str
    get: str
    layout: str
    source: str
    structures: dict[str, StructureRule] = field(default_factory=dict)
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def name_to_id(self) -> dict[str, int]:
        """Structure → number, for the structures that are one number of their own."""
        rules = self.structures.items()
        return {name: rule.values[0] for name, rule in rules if len(rule.values) == 1 and rule.side is None}

    @property
    def annotated(self) -> tuple[str, ...]:
        """The structures that the data set annotates, in the order of its file."""
        return tuple(self.structures or self.files)

    @property
    def values(self) -> set[int]:
        """All values of label maps that stand for a structure."""
        return {value for rule in self.structures.values() for value in rule.values}


def dataset_names() -> list[str]:
    """Returns the names of the data sets that have a YAML file, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


@lru_cache(maxsize=64)
def load_dataset(name: str) -> LabelMap:
    """Reads the file of one data set.

    Args:
        name: One of `dataset_names()`. A path is refused.

    Raises:
        InputError: There is no data set of that name.
        ValueError: The YAML file does not have the form of `LabelMap`.
    """
    known = dataset_names()
    if name not in known:
        raise InputError(f"unknown data set {name!r}{did_you_mean(name, known)}", hint="known: " + ", ".join(known))
    return parse_dataset(yaml.safe_load((_FOLDER / f"{name}.yaml").read_text()), f"{name}.yaml")


def parse_dataset(raw: Any, where: str, own: Collection[str] = ()) -> LabelMap:
    """Makes a `LabelMap` of what a YAML file holds.

    Args:
        raw: The content.
        where: The file's name, for errors.
        own: Structures that the class table does not have and that the file may name.

    Raises:
        ValueError: A key is missing or unknown, a structure is unknown, a value is no positive whole number, or a side
            does not fit the structure.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{where} holds no mapping")
    unknown = set(raw) - {*TEXTS, "structures", "files"}
    if unknown:
        key = str(sorted(map(str, unknown))[0])
        raise ValueError(f"{where} has the key {key!r}{did_you_mean(key, [*TEXTS, 'structures', 'files'])}")
    for key in TEXTS:
        if not isinstance(raw.get(key), str):
            raise ValueError(f"{where} has no text {key!r}")
    sections = {key: raw.get(key) or {} for key in ("structures", "files")}
    for key, section in sections.items():
        if not isinstance(section, dict):
            raise ValueError(f"{where}: {key} is a mapping of structures, got {section!r:.60}")
    structures = {name: _rule(name, rule, where) for name, rule in sections["structures"].items()}
    files = {name: _patterns(name, patterns, where) for name, patterns in sections["files"].items()}
    for name in (*structures, *files):
        if name not in load_table() and name not in own:
            known = [label.name for label in load_table()]
            raise ValueError(f"{where} names {name!r}{did_you_mean(str(name), known)}, no structure of the class table")
    if not structures and not files:
        raise ValueError(f"{where} lists no structure")
    return LabelMap(**{key: raw[key] for key in TEXTS}, structures=structures, files=files)


def _patterns(name: str, patterns: Any, where: str) -> tuple[str, ...]:
    """Returns the patterns of a structure's mask files: a list of texts, or one text."""
    given = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(given, list) or not given or not all(isinstance(pattern, str) for pattern in given):
        raise ValueError(f"{where}: the files of {name} are a list of patterns, got {patterns!r:.60}")
    return tuple(given)


def _rule(name: str, rule: Any, where: str) -> StructureRule:
    """Returns the rule of a structure: a number, a list of numbers, or `{values: […], side: left}`."""
    side = None
    if isinstance(rule, dict):
        if set(rule) != {"values", "side"} or rule["side"] not in _SIDES or not name.endswith(f"_{rule['side']}"):
            raise ValueError(f"{where}: {name} needs values and the side that its name ends with, got {rule}")
        rule, side = rule["values"], rule["side"]
    values = rule if isinstance(rule, list) else [rule]
    if not values or not all(isinstance(v, int) and not isinstance(v, bool) and 0 < v < 2**31 for v in values):
        raise ValueError(f"{where}: {name} is a positive whole number or a list of them, got {rule!r}")
    return StructureRule(tuple(values), side)
