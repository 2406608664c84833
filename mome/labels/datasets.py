"""The label numbers of data sets: one YAML file per data set in `maps/`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from mome.errors import InputError, did_you_mean
from mome.labels.table import load_table

_FOLDER = Path(__file__).parent / "maps"


@dataclass(frozen=True)
class LabelMap:
    """The numbers that a data set uses in its label maps.

    Attributes:
        name: The data set's name.
        source: The publication or file that the numbers come from.
        name_to_id: Label name → number in the data set's label maps.
    """

    name: str
    source: str
    name_to_id: dict[str, int]


def dataset_names() -> list[str]:
    """Returns the names of the data sets that have a YAML file, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


@lru_cache(maxsize=16)
def load_dataset(name: str) -> LabelMap:
    """Reads the numbers of one data set.

    Args:
        name: One of `dataset_names()`. A path is refused.

    Raises:
        InputError: There is no data set of that name.
        ValueError: The YAML file names a structure that the class table does not have.
    """
    known = dataset_names()
    if name not in known:
        raise InputError(f"unknown data set {name!r}{did_you_mean(name, known)}", hint="known: " + ", ".join(known))
    raw = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text())
    numbers = {label: int(number) for number, label in raw["labels"].items()}
    missing = [label for label in numbers if label not in load_table()]
    if missing:
        raise ValueError(f"{name}.yaml names {missing[0]!r}, which the class table does not have")
    return LabelMap(raw["name"], raw["source"], numbers)
