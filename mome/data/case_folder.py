"""A folder of partially labelled cases: `images/`, `labels/` and `cases.json`.

```
folder/images/<case>.nii.gz     CT in HU, or another format that `read_volume` reads
folder/labels/<case>.nii.gz     label map, likewise; its numbers are the data set's own
folder/cases.json               {"<case>": {"annotated": ["liver", ...]}, ...}
```
A structure that is not in a case's `annotated` list is unknown in this case, not background.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mome.errors import InputError, did_you_mean
from mome.labels import load_dataset
from mome.volumes.case_list import read_case_list
from mome.volumes.scan_files import listed, scan_ending, stem

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """One scan with its label map.

    Attributes:
        name: File name without its ending.
        image: Path of the scan.
        labels: Path of the label map.
        annotated: Names of the structures annotated in this case.
    """

    name: str
    image: Path
    labels: Path
    annotated: tuple[str, ...]


class CaseFolder:
    """The cases of one folder, in the order of `cases.json`.

    Args:
        folder: Laid out as the module's description says.
        dataset: Name of the label YAML that maps the numbers of the label maps to label names, as in `openkbp`.

    Raises:
        InputError: There is no `cases.json` or it is damaged, a file that it names is missing, it names a structure
            that the data set does not have, or it lists no case.
    """

    def __init__(self, folder: str | Path, dataset: str) -> None:
        self.folder = Path(folder)
        self.ids: dict[str, int] = load_dataset(dataset).name_to_id
        index = self.folder / "cases.json"
        if not index.is_file():
            raise InputError("no cases.json, which lists what is annotated in each case", where=str(self.folder))
        images, maps = (_scans_by_name(self.folder / kind) for kind in ("images", "labels"))
        self.cases: list[Case] = []
        for name, annotated in read_case_list(index).items():
            for found, kind in ((images, "images"), (maps, "labels")):
                if name not in found:
                    missing = self.folder / kind / f"{name}.nii.gz"
                    raise InputError(f"case {name!r:.60} of cases.json has no file", where=str(missing))
            case = Case(name, images[name], maps[name], annotated)
            unknown = [label for label in case.annotated if label not in self.ids]
            if unknown:
                raise InputError(
                    f"case {name!r:.60} lists {unknown[0]!r:.60}, which data set {dataset!r} does not have"
                    + did_you_mean(unknown[0][:60], self.ids),
                    where=str(index),
                    hint="names: " + ", ".join(self.ids),
                )
            if not annotated:
                logger.warning("case %r of %s has no annotated structure: nothing is learned from it", name, index)
            self.cases.append(case)
        if not self.cases:
            raise InputError("cases.json lists no case", where=str(index), hint='{"<case>": {"annotated": ["liver"]}}')

    def __len__(self) -> int:
        return len(self.cases)

    def __iter__(self) -> Iterator[Case]:
        return iter(self.cases)


def _scans_by_name(folder: Path) -> dict[str, Path]:
    """Returns the scans of a folder by their names without the ending. Of equal names, `.nii.gz` is taken."""
    if not folder.is_dir():
        return {}
    found: dict[str, Path] = {}
    for path in listed(folder):
        ending = scan_ending(path)
        if ending is not None and (stem(path) not in found or ending == ".nii.gz"):
            found[stem(path)] = path
    return found
