"""What every layout has, and what several of them share."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

from mome.data.case import Case
from mome.errors import InputError, did_you_mean
from mome.labels import LabelMap, load_table
from mome.labels.dataset import StructureRule
from mome.labels.own import find_own, read_own_structures, suggested_name
from mome.volumes.scan_files import listed, scan_ending, stem


class Layout:
    """Finds the cases of a folder.

    Attributes:
        shape: The layout in one line, for messages.
        own: Structures that the class table does not have, which the folder may name; `open_cases` sets them.
    """

    shape: ClassVar[str]
    own: Collection[str] = ()

    def cases(self, folder: Path, dataset: LabelMap | None) -> list[Case]:
        """Lists the cases; no volume is read.

        Args:
            folder: The folder.
            dataset: The data set whose numbers the label maps use; None where the folder names them.

        Raises:
            InputError: The folder is not laid out so, or a file is missing.
        """
        raise NotImplementedError


def scans_by_name(folder: Path) -> dict[str, Path]:
    """Returns the scans of a folder by their names without the ending. Of equal names, `.nii.gz` is taken."""
    if not folder.is_dir():
        return {}
    found: dict[str, Path] = {}
    for path in listed(folder):
        ending = scan_ending(path)
        if ending is not None and (stem(path) not in found or ending == ".nii.gz"):
            found[stem(path)] = path
    return found


def structure_name(text: str, where: Path, own: Collection[str]) -> str:
    """Returns the structure that a file calls `text`, of the class table or of one's own.

    Raises:
        InputError: There is no such structure.
    """
    table, mine = load_table(), find_own(text, own)
    if mine is not None:
        return mine
    found = table.resolve(text) if text.strip() else None
    if found is None or found.name is None or found.how not in ("exact", "synonym") or found.name not in table:
        close = did_you_mean(text, [*table.names(), *own])
        raise InputError(
            f"{text!r:.60} is no structure of the class table{close}",
            where=str(where),
            hint=_how_to_name(text),
        )
    return found.name


def _how_to_name(text: str) -> str:
    """Returns what to do about a structure that is unknown."""
    name = suggested_name(text)
    try:
        read_own_structures({name: None})
    except InputError:
        return "--dataset with a YAML file of yours: python -m pydoc mome.labels.dataset_file"
    return f"--own {name} if it is a structure of your own; in a configuration, structures: {{{name}: []}}"


def rules_of(dataset: LabelMap, where: Path) -> dict[str, StructureRule]:
    """Returns the rules of a data set for label maps.

    Raises:
        InputError: The data set has a file per structure and no numbers.
    """
    if not dataset.structures:
        raise InputError(
            f"data set {dataset.name!r} has no numbers: its structures are files", where=str(where), hint="layout masks"
        )
    return dataset.structures
