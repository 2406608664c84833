"""Data sets of a user's own: a YAML file that says what the numbers of label maps mean.

```yaml
structures:
  liver: [1, 2]        # the union of two numbers
  thymus: 3            # a structure that the class table does not have
  kidney_left: {values: [4], side: left}     # a number that stands for both sides
  kidney_right: {values: [4], side: right}
```
The other keys of the files in `mome/labels/datasets` may stand there, too: `layout`, `files`, `name` and so on.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from mome.errors import InputError
from mome.labels.dataset import TEXTS, LabelMap, load_dataset, parse_dataset
from mome.labels.own import read_own_structures
from mome.labels.table import load_table
from mome.text_file import read_text
from mome.yaml_file import LONGEST, read_yaml

_ENDINGS = (".yaml", ".yml")


def is_dataset_file(text: str) -> bool:
    """Says whether a text is the path of a YAML file, not the name of a data set of the package."""
    return text.lower().endswith(_ENDINGS)


def dataset_path(text: str) -> Path:
    """Returns the file that a text names; `${NAME}` and `~` are expanded."""
    return Path(os.path.expandvars(text)).expanduser()


def open_dataset(text: str) -> LabelMap:
    """Returns a data set.

    Args:
        text: The name of a data set of the package, or the path of a YAML file; `${NAME}` and `~` are expanded in it.

    Raises:
        InputError: There is no such data set or file, or the file is none of a data set.
    """
    if not is_dataset_file(text):
        return load_dataset(text)
    path = dataset_path(text)
    try:
        found = path.stat()
    except OSError as error:
        what = f"the data set cannot be read: {error.strerror}"
        raise InputError(what, where=str(path), hint="check the path") from error
    return _read(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=8)
def _read(path: Path, modified: int, size: int) -> LabelMap:
    """Reads a file once for each of its versions, because evaluation opens the data set for every case."""
    raw = read_yaml(read_text(path, "the data set", limit=4 * LONGEST), str(path))
    texts = {**dict.fromkeys(TEXTS, ""), "name": path.stem}
    try:
        found = parse_dataset({**texts, **raw} if isinstance(raw, dict) else raw, path.name, _own_structures(raw))
        _check_values(found)
    except ValueError as error:  # an InputError is one
        what, hint = (error.what, error.hint) if isinstance(error, InputError) else (str(error), None)
        raise InputError(what, where=str(path), hint=hint or "structures: {liver: [1, 2], thymus: 3}") from error
    return found


def _check_values(found: LabelMap) -> None:
    """Checks that masks are numbers or files, and that no two structures are the same numbers.

    Raises:
        ValueError: They are not.
    """
    if found.structures and found.files:
        raise ValueError(f"{found.name} has structures (numbers) and files: a data set has one of them")
    owners: dict[tuple[tuple[int, ...], str | None], str] = {}
    for name, rule in found.structures.items():
        other = owners.setdefault((tuple(sorted(rule.values)), rule.side), name)
        if other != name:
            raise ValueError(f"{found.name} gives {other} and {name} the same numbers")


def own_names(dataset: str | None) -> list[str]:
    """Returns the structures of a data set that the class table does not have; none where no data set is named."""
    names = () if dataset is None else open_dataset(dataset).annotated
    return [name for name in names if name not in load_table()]


def _own_structures(raw: object) -> list[str]:
    """Returns the structures of a data set that the class table does not have.

    Raises:
        InputError: One may be a typo, or is another name of a structure of the class table.
    """
    sections = [raw.get(key) for key in ("structures", "files")] if isinstance(raw, dict) else []
    names = [name for section in sections if isinstance(section, dict) for name in section]
    return list(read_own_structures({name: None for name in names if name not in load_table()}))
