"""A folder per case that holds the scan and a mask file per structure, as TotalSegmentator's training data.

```
folder/s0011/ct.nii.gz
folder/s0011/segmentations/liver.nii.gz
```
The scan is the file `ct`, `image` or `scan`, or the only scan in the case's folder. Masks are in `segmentations/`,
`masks/` or `labels/`; their names are those of structures or other words for them, as in `Left_Kidney`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mome.data.case import Case
from mome.data.layouts.base import Layout, scans_by_name
from mome.errors import InputError
from mome.labels import LabelMap, load_table
from mome.labels.own import find_own
from mome.volumes.scan_files import listed

_SCANS, _FOLDERS = ("ct", "image", "scan"), ("segmentations", "masks", "labels")


class Masks(Layout):
    """<case>/ct and <case>/segmentations/<structure>."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The layout has no settings."""

    shape: ClassVar[str] = "<case>/ct.nii.gz, <case>/segmentations/<structure>.nii.gz"

    def __init__(self, config: Config) -> None:
        pass

    def cases(self, folder: Path, dataset: LabelMap | None) -> list[Case]:
        found = []
        for place in listed(folder):
            if not place.is_dir() or place.name.startswith("."):
                continue
            masks = next((there for name in _FOLDERS if (there := scans_by_name(place / name))), {})
            if not masks:
                continue
            chosen = _structures(masks, dataset, self.own)
            if not chosen:
                raise InputError(
                    f"no mask of case {place.name!r:.60} is a structure of the class table: {', '.join(masks)[:80]}",
                    where=str(place),
                    hint="name a data set whose YAML says what its files are, or structures of your own with --own",
                )
            found.append(Case(place.name, _scan(place), None, tuple(chosen), masks=chosen, patient=place.name))
        return found


def _scan(place: Path) -> Path:
    """Returns the scan of a case.

    Raises:
        InputError: There is none, or several files may be it.
    """
    scans = scans_by_name(place)
    for name in _SCANS:
        if name in scans:
            return scans[name]
    if len(scans) != 1:
        what = "no scan" if not scans else f"{len(scans)} files that may be the scan"
        raise InputError(f"the case has {what}", where=str(place), hint="name it ct.nii.gz")
    return next(iter(scans.values()))


def _structures(masks: dict[str, Path], dataset: LabelMap | None, own: Collection[str]) -> dict[str, tuple[Path, ...]]:
    """Returns structure → mask files. A file that no word for a structure names is left out: it is unknown.

    Raises:
        InputError: Two files are of one structure.
    """
    of_own = _by_structure(masks, lambda name: find_own(name, own))
    if dataset is not None and dataset.files:
        matches = {
            name: tuple(path for file, path in masks.items() if any(fnmatch.fnmatchcase(file, p) for p in wanted))
            for name, wanted in dataset.files.items()
            # Without its own file, an organ would be its tumours alone.
            if all(pattern in masks for pattern in wanted if "*" not in pattern)
        }
        return {**of_own, **{name: paths for name, paths in matches.items() if paths}}
    allowed = set(dataset.annotated if dataset else load_table().names())
    files = {name: path for name, path in masks.items() if _name_in_table(name) in allowed}
    return {**of_own, **_by_structure(files, _name_in_table)}


def _by_structure(masks: dict[str, Path], find: Callable[[str], str | None]) -> dict[str, tuple[Path, ...]]:
    """Returns structure → its mask file, for the files that `find` knows by their names.

    Raises:
        InputError: Two files are of one structure.
    """
    found = dict[str, tuple[Path, ...]]()
    for name, path in masks.items():
        structure = find(name)
        if structure in found:
            where = f"{found[structure][0]} and {path}"
            raise InputError(f"two masks are of {structure!r:.60}", where=where, hint="keep one")
        if structure is not None:
            found[structure] = (path,)
    return found


def _name_in_table(text: str) -> str | None:
    """Returns the structure of the class table that a file's name is, or is another word for, as in "Left_Kidney"."""
    table = load_table()
    if text in table:
        return text
    found = table.resolve(text.replace("_", " "))
    return found.name if found.how in ("exact", "synonym") and found.name in table else None
