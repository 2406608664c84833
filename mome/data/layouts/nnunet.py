"""nnU-Net's raw data sets and the Medical Segmentation Decathlon: `imagesTr/`, `labelsTr/` and `dataset.json`.

nnU-Net names images `<case>_0000.nii.gz`, with a number per channel, and writes `{"liver": 1}` into `dataset.json`, or
`{"liver": [1, 2]}` for regions. The Decathlon names images like their labels and writes `{"1": "liver"}`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mome.data.case import Case
from mome.data.layouts.base import Layout, rules_of, scans_by_name, structure_name
from mome.errors import InputError
from mome.labels import LabelMap
from mome.labels.dataset import StructureRule
from mome.text_file import read_json

_IGNORED = ("background", "ignore")


class NnUNet(Layout):
    """imagesTr/<case>_0000, labelsTr/<case> and dataset.json."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `nnunet`.

        Args:
            part: `Tr` for imagesTr and labelsTr, `Ts` for imagesTs and labelsTs.
            channel: The channel that is the CT, as in 0 for `<case>_0000`.
        """

        part: str = "Tr"
        channel: int = 0

    shape: ClassVar[str] = "imagesTr/<case>_0000.nii.gz, labelsTr/<case>.nii.gz, dataset.json"

    def __init__(self, config: Config) -> None:
        if config.part not in ("Tr", "Ts") or not 0 <= config.channel < 10000:
            raise InputError(
                f"layout nnunet has part 'Tr' or 'Ts' and a channel from 0, got {config.part!r}, {config.channel}",
                hint="nnunet(part='Ts')",
            )
        self.part, self.channel = config.part, config.channel

    def cases(self, folder: Path, dataset: LabelMap | None) -> list[Case]:
        images, labels = scans_by_name(folder / f"images{self.part}"), scans_by_name(folder / f"labels{self.part}")
        if not labels:
            where = folder / f"labels{self.part}"
            raise InputError("the folder holds no label maps", where=str(where), hint=f"layout nnunet: {self.shape}")
        rules = rules_of(dataset, folder) if dataset else _rules(folder / "dataset.json", self.own)
        named = frozenset(value for rule in rules.values() for value in rule.values)
        if dataset is None:
            named |= _values(folder / "dataset.json")
        ignored = _ignored_values(folder / "dataset.json") - frozenset(dataset.values if dataset else ())
        found = []
        for name, path in labels.items():
            image = images.get(f"{name}_{self.channel:04d}", images.get(name))
            if image is None:
                missing = folder / f"images{self.part}" / f"{name}_{self.channel:04d}.nii.gz"
                raise InputError(f"case {name!r:.60} has a label map and no scan", where=str(missing))
            found.append(Case(name, image, path, tuple(rules), rules, named, ignored_values=ignored))
        return found


def _labels_of(path: Path) -> dict[str, Any]:
    labels = read_json(path, "dataset.json", hint="layout nnunet needs it where no data set is named").get("labels")
    if not isinstance(labels, dict) or not labels:
        raise InputError("dataset.json names no labels", where=str(path), hint='{"labels": {"liver": 1}}')
    return labels


def _pairs(path: Path) -> list[tuple[str, list[int]]]:
    """Returns (name, values) of `dataset.json`, in either direction.

    Raises:
        InputError: A value is no whole number.
    """
    pairs = []
    for key, value in _labels_of(path).items():
        name, numbers = (value, [key]) if isinstance(value, str) and key.isdigit() else (key, value)
        numbers = numbers if isinstance(numbers, list) else [numbers]
        if not numbers or not all(_is_whole(number) for number in numbers):
            raise InputError(
                f"dataset.json gives {name!r:.60} the value {value!r:.60}", where=str(path), hint='{"liver": 1}'
            )
        pairs.append((str(name), [int(number) for number in numbers]))
    return pairs


def _is_whole(number: Any) -> bool:
    """Says whether a value of `dataset.json` is a whole number, or the digits of one."""
    digits = isinstance(number, str) and number.isdecimal() and len(number) < 10
    return digits or (isinstance(number, int) and not isinstance(number, bool))


def _rules(path: Path, own: Collection[str]) -> dict[str, StructureRule]:
    """Returns the rules that `dataset.json` states, with the names of the class table and of one's own structures.

    Raises:
        InputError: It is damaged, or has another name.
    """
    rules: dict[str, StructureRule] = {}
    of_values: dict[tuple[int, ...], str] = {}
    for name, values in _pairs(path):
        if name.lower() in _IGNORED or values == [0]:
            continue
        if 0 in values:
            raise InputError(
                f"dataset.json counts the background, 0, to {name!r:.60}", where=str(path), hint="leave 0 out"
            )
        other = of_values.setdefault(tuple(sorted(set(values))), name)
        if other != name:  # a region may share some of its values, as a tumour those of its organ
            raise InputError(
                f"dataset.json gives {other!r:.60} and {name!r:.60} the value {' + '.join(map(str, values))}",
                where=str(path),
                hint="each structure its own number",
            )
        structure = structure_name(name.replace("_", " "), path, own)
        if structure in rules:
            raise InputError(f"dataset.json names {structure} twice", where=str(path), hint="name a data set instead")
        rules[structure] = StructureRule(tuple(values))
    return rules


def _ignored_values(path: Path) -> frozenset[int]:
    """Returns the values of voxels that nobody annotated; none where there is no `dataset.json` that can be read."""
    try:
        pairs = _pairs(path)
    except InputError:  # where a data set is named, nothing else is taken from the file
        return frozenset()
    return frozenset(value for name, values in pairs for value in values if name.lower() == "ignore")


def _values(path: Path) -> frozenset[int]:
    return frozenset(value for _, values in _pairs(path) for value in values if value > 0)
