"""The label numbers of each data set: one YAML per data set in `maps/`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from mome.errors import InputError
from mome.labels.table import load_table

_FOLDER = Path(__file__).parent / "maps"


@dataclass(frozen=True)
class LabelMap:
    """A data set's own numbers.

    Attributes:
        name: Of the data set.
        source: Where the numbers come from.
        name_to_id: Label name → number in the data set's label maps.
    """

    name: str
    source: str
    name_to_id: dict[str, int]


def dataset_names() -> list[str]:
    """Data sets that have a YAML."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


@lru_cache(maxsize=16)
def load_dataset(name: str) -> LabelMap:
    """One data set's numbers.

    Raises:
        InputError: No YAML of that name.
    """
    if name not in dataset_names():  # a name, never a path
        raise InputError(f"unknown data set {name!r}", hint="known: " + ", ".join(dataset_names()))
    raw = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text())
    numbers = {label: int(number) for number, label in raw["labels"].items()}
    strangers = [label for label in numbers if label not in load_table()]
    if strangers:
        raise ValueError(f"{name}.yaml names {strangers[0]!r}, which the class table does not have")
    return LabelMap(raw["name"], raw["source"], numbers)
