"""Opens training cases on the network grid, windowed to uint8, as memory-mapped arrays on disk.

`mome.data.cache_build` writes them. There is one folder per data set and settings; `index.json` holds a checksum of
every array, which is compared when the array is first used.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mome.data.label_codes import check_codes, places_of
from mome.errors import InputError
from mome.text_file import read_json

_REBUILD = "remove this folder; the next run builds it again"


@dataclass(frozen=True)
class CachedCase:
    """One case on the network grid.

    Attributes:
        name: The case's name.
        volume: uint8 (D, H, W); 0 and 255 are the ends of the HU window.
        labels: uint8 or uint16 (D, H, W); codes of the sets of structures that a voxel belongs to.
        codes: Code → names of the structures; code 0 is none. Structures may overlap, as a liver and its tumour.
        annotated: Names of the structures annotated in this case.
        voxels: For every annotated structure, the flat indices of its voxels, of at most 10,000 of them.
    """

    name: str
    volume: np.ndarray
    labels: np.ndarray
    codes: tuple[tuple[str, ...], ...]
    annotated: tuple[str, ...]
    voxels: dict[str, np.ndarray]


class CaseCache:
    """The cached cases of one source.

    Args:
        folder: Folder of the cache. Only its index is read; arrays are opened when a case is asked for.
        names: Labels that the cache numbers from 1.

    Attributes:
        index: For every case: `file`, `name`, `annotated`, `codes`, `shape`, `notes` and `checksums`.
        problems: Case that was left out → the reason.

    Raises:
        InputError: The index is damaged.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.label_names = names
        path = folder / "index.json"
        cases = read_json(path, "the index of a training cache", hint=_REBUILD).get("cases")
        if not isinstance(cases, list) or not all(is_entry(entry, names) for entry in cases):
            raise InputError("the index of a training cache is damaged", where=str(path), hint=_REBUILD)
        self.index: list[dict[str, Any]] = cases
        problems = folder / "problems.json"
        found = read_json(problems, "the problems of a training cache", hint=_REBUILD) if problems.exists() else {}
        self.problems = {str(name): str(reason) for name, reason in found.items()}
        self._open: dict[int, CachedCase] = {}

    def __len__(self) -> int:
        return len(self.index)

    @property
    def notes(self) -> list[str]:
        """Sentences for the user: cases that were left out, and annotated structures without a voxel."""
        left_out = [f"case {name!r} is left out: {reason.splitlines()[0]}" for name, reason in self.problems.items()]
        return [*left_out, *(note for entry in self.index for note in entry["notes"])]

    def __getitem__(self, i: int) -> CachedCase:
        """Returns a case.

        Raises:
            InputError: Its arrays are damaged or missing.
        """
        if i not in self._open:
            entry = self.index[i]
            labels, volume = self._array(entry, "labels"), self._array(entry, "volume")
            codes = tuple(tuple(self.label_names[n] for n in code) for code in entry["codes"])
            voxels = {name: places_of(labels, codes, name) for name in entry["annotated"]}
            self._open[i] = CachedCase(entry["name"], volume, labels, codes, tuple(entry["annotated"]), voxels)
        return self._open[i]

    def _array(self, entry: dict[str, Any], kind: str) -> np.ndarray:
        """Returns a memory-mapped array of a case, after its checksum was compared.

        Raises:
            InputError: The file is missing, or is not what was written.
        """
        path = self.folder / f"{entry['file']}.{kind}.npy"
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError, SyntaxError) as error:
            raise InputError(
                "a file of a training cache is damaged or missing", where=str(path), hint=_REBUILD
            ) from error
        dtypes = (np.uint8, np.uint16) if kind == "labels" else (np.uint8,)
        as_written = (list(array.shape), checksum(array)) == (entry["shape"], entry["checksums"][kind])
        if array.dtype not in dtypes or not as_written:
            raise InputError("a file of a training cache has changed", where=str(path), hint=_REBUILD)
        return array


def checksum(array: np.ndarray) -> str:
    """Returns the BLAKE2 digest of an array's values."""
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()


def is_entry(entry: Any, names: list[str]) -> bool:
    """Says whether an entry of an index has the form that `build_cache` writes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str) or not isinstance(entry.get("name"), str):
        return False
    lists = [entry.get(key) for key in ("annotated", "shape", "notes")]
    sums = entry.get("checksums")
    if not all(isinstance(value, list) for value in lists) or not isinstance(sums, dict):
        return False
    return (
        re.fullmatch(r"\d{5,}", entry["file"]) is not None  # the name of a file in the cache, never a path
        and all(name in names for name in entry["annotated"])
        and len(entry["shape"]) == 3
        and all(isinstance(note, str) for note in entry["notes"])
        and {"labels", "volume"} <= set(sums)
        and check_codes(entry.get("codes"), len(names))
    )
