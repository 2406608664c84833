"""A folder of partially labelled cases: `images/`, `labels/` and `cases.json`.

```
folder/images/<case>.nii.gz     CT in HU
folder/labels/<case>.nii.gz     label map; its numbers are the data set's own
folder/cases.json               {"<case>": {"annotated": ["liver", ...]}, ...}
```
A structure that is not in a case's `annotated` list is unknown in this case, not background.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mome.errors import InputError, did_you_mean
from mome.labels import load_dataset
from mome.text_file import read_json

_FORM = '{"case": {"annotated": ["mandible", …]}, …}'


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
        InputError: No `cases.json`, one that lists no case or is of another form, a file that it names is missing, or
            a structure that the data set does not have.
    """

    def __init__(self, folder: str | Path, dataset: str) -> None:
        self.folder = Path(folder)
        self.ids: dict[str, int] = load_dataset(dataset).name_to_id
        index = self.folder / "cases.json"
        if not index.is_file():
            raise InputError("no cases.json, which lists what is annotated in each case", where=str(self.folder))
        listed = read_json(index, "cases.json", hint=_FORM)
        if not listed:
            raise InputError("cases.json lists no case", where=str(index), hint=_FORM)
        self.cases: list[Case] = []
        for name, entry in listed.items():
            annotated = _annotated(name, entry, index)
            image, labels = (self.folder / kind / f"{name}.nii.gz" for kind in ("images", "labels"))
            case = Case(name, image, labels, annotated)
            for path in (case.image, case.labels):
                if not path.is_file():
                    raise InputError(f"case {name!r:.60} of cases.json has no file", where=str(path))
            unknown = [label for label in case.annotated if label not in self.ids]
            if unknown:
                raise InputError(
                    f"case {name!r:.60} lists {unknown[0]!r:.60}, which data set {dataset!r} does not have"
                    + did_you_mean(unknown[0][:60], self.ids),
                    where=str(index),
                    hint="names: " + ", ".join(self.ids),
                )
            self.cases.append(case)

    def __len__(self) -> int:
        return len(self.cases)

    def __iter__(self) -> Iterator[Case]:
        return iter(self.cases)


def _annotated(name: str, entry: Any, index: Path) -> tuple[str, ...]:
    """Checks one case of `cases.json` and returns the structures annotated in it.

    Raises:
        InputError: The name is a path, or the entry has another form.
    """
    if not name or name.startswith(".") or any(c in name for c in "/\\\0"):
        raise InputError(f"{name!r:.60} is not the name of a case: names are no paths", where=str(index), hint=_FORM)
    annotated = entry.get("annotated") if isinstance(entry, dict) else None
    if not isinstance(annotated, list) or not all(isinstance(label, str) for label in annotated):
        raise InputError(f"case {name!r:.60} has no list 'annotated' of names", where=str(index), hint=_FORM)
    if len(set(annotated)) != len(annotated):
        raise InputError(f"case {name!r:.60} lists a structure twice", where=str(index), hint=_FORM)
    return tuple(annotated)
