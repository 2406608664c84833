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
from pathlib import Path

from mome.data.case import Case
from mome.data.layouts.base import scans_by_name
from mome.errors import InputError, did_you_mean
from mome.labels import LabelMap, load_dataset
from mome.volumes.case_list import read_case_list

logger = logging.getLogger(__name__)


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
        self.cases = cases_of_folder(self.folder, load_dataset(dataset))

    def __len__(self) -> int:
        return len(self.cases)

    def __iter__(self) -> Iterator[Case]:
        return iter(self.cases)


def cases_of_folder(folder: Path, dataset: LabelMap) -> list[Case]:
    """Lists the cases of a folder; see `CaseFolder`."""
    index = folder / "cases.json"
    if not index.is_file():
        raise InputError("no cases.json, which lists what is annotated in each case", where=str(folder))
    images, maps = (scans_by_name(folder / kind) for kind in ("images", "labels"))
    named, cases = frozenset(dataset.values), list[Case]()
    for name, annotated in read_case_list(index).items():
        for found, kind in ((images, "images"), (maps, "labels")):
            if name not in found:
                missing = folder / kind / f"{name}.nii.gz"
                raise InputError(f"case {name!r:.60} of cases.json has no file", where=str(missing))
        unknown = [label for label in annotated if label not in dataset.structures]
        if unknown:
            raise InputError(
                f"case {name!r:.60} lists {unknown[0]!r:.60}, which data set {dataset.name!r} does not have"
                + did_you_mean(unknown[0][:60], dataset.structures),
                where=str(index),
                hint="names: " + ", ".join(dataset.structures),
            )
        if not annotated:
            logger.warning("case %r of %s has no annotated structure: nothing is learned from it", name, index)
        rules = {label: dataset.structures[label] for label in annotated}
        cases.append(Case(name, images[name], maps[name], annotated, rules, named))
    if not cases:
        raise InputError("cases.json lists no case", where=str(index), hint='{"<case>": {"annotated": ["liver"]}}')
    return cases
