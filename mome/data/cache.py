"""Opens training cases on the network grid, windowed to uint8, as arrays on disk of which patches are read.

`mome.data.cache_build` writes them. There is one folder per data set and settings; `index.json` holds a checksum of
every array, which is compared when the array is first used. Arrays are memory-mapped, or compressed in chunks.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mome.data.chunked_array import ChunkedArray
from mome.data.label_codes import check_codes
from mome.data.mapped_pages import release_pages
from mome.data.structure_places import block_bytes, split_places
from mome.errors import InputError
from mome.text_file import read_json

FORMATS = ("plain", "blosc2")
_REBUILD = "remove this folder; the next run builds it again"
_MOST_OPEN = 64  # cases; each memory-mapped array holds a file open, and processes may open about a thousand
_Opened = TypeVar("_Opened")


@dataclass(frozen=True)
class CachedCase:
    """One case on the network grid.

    Attributes:
        name: The case's name.
        volume: uint8 (D, H, W); 0 and 255 are the ends of the HU window. Boxes are read by slices.
        labels: uint8 or uint16 (D, H, W); codes of the sets of structures that a voxel belongs to, likewise.
        codes: Code → names of the structures; code 0 is none. Structures may overlap, as a liver and its tumour.
        members: bool (codes, labels of the cache): whether a code's set holds a label.
        annotated: Names of the structures annotated in this case.
        voxels: See `CasePlaces`.
    """

    name: str
    volume: Any
    labels: Any
    codes: tuple[tuple[str, ...], ...]
    members: np.ndarray
    annotated: tuple[str, ...]
    voxels: dict[str, np.ndarray]


@dataclass(frozen=True)
class CasePlaces:
    """Where the structures of a case lie.

    Attributes:
        voxels: For every annotated structure, the flat indices of its voxels, of at most 10,000 of them.
        blocks: See `mome.data.structure_places.blocks_of`; a row per annotated structure.
    """

    voxels: dict[str, np.ndarray]
    blocks: np.ndarray


class CaseCache:
    """The cached cases of one source.

    Args:
        folder: Folder of the cache. Only its index is read; arrays are opened when a case is asked for.
        names: Labels that the cache numbers from 1.

    Attributes:
        index: For every case: `file`, `name`, `annotated`, `codes`, `shape`, `notes`, `places`, `format`, `label_type`
            and `checksums`.
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
        self._open: OrderedDict[int, CachedCase] = OrderedDict()
        self._places: OrderedDict[int, CasePlaces] = OrderedDict()
        self._seen: dict[Path, tuple[int, int, int]] = {}  # file → its identity when its checksum was compared

    def __len__(self) -> int:
        return len(self.index)

    @property
    def notes(self) -> list[str]:
        """Sentences for the user: cases that were left out, and annotated structures without a voxel."""
        left_out = [f"case {name!r} is left out: {reason.splitlines()[0]}" for name, reason in self.problems.items()]
        return [*left_out, *(note for entry in self.index for note in entry["notes"])]

    def voxel_counts(self, i: int) -> dict[str, int]:
        """Returns, for every annotated structure of a case, the number of its voxels that centres are drawn from."""
        entry = self.index[i]
        return dict(zip(entry["annotated"], entry["places"], strict=True))

    def __getitem__(self, i: int) -> CachedCase:
        """Returns a case.

        Raises:
            InputError: Its arrays are damaged or missing, or changed since they were opened.
        """
        entry = self.index[i]
        if i in self._open:
            self._open.move_to_end(i)
            for path in self._files(entry):
                self._check_unchanged(path)
            return self._open[i]
        codes = tuple(tuple(self.label_names[n] for n in code) for code in entry["codes"])
        members = np.zeros((len(codes), len(self.label_names)), dtype=bool)
        for code, numbers in enumerate(entry["codes"]):
            members[code, numbers] = True
        case = CachedCase(
            entry["name"],
            self._volume(entry, "volume"),
            self._volume(entry, "labels"),
            codes,
            members,
            tuple(entry["annotated"]),
            self.places(i).voxels,
        )
        return _kept(self._open, i, case)

    def places(self, i: int) -> CasePlaces:
        """Returns where the structures of a case lie, without opening its volume.

        Raises:
            InputError: The arrays are damaged or missing.
        """
        if i not in self._places:
            entry, counts = self.index[i], self.voxel_counts(i)
            places = self._array(entry, "places", (np.int32,), [sum(counts.values())])
            blocks = self._array(entry, "blocks", (np.uint8,), [len(counts), block_bytes(entry["shape"])])
            _kept(self._places, i, CasePlaces(split_places(places, counts), blocks))
        self._places.move_to_end(i)
        return self._places[i]

    def _files(self, entry: dict[str, Any]) -> list[Path]:
        """Returns the files of a case that patches are read from."""
        endings = ("volume.b2", "labels.b2") if entry["format"] == "blosc2" else ("volume.npy", "labels.npy")
        return [self.folder / f"{entry['file']}.{ending}" for ending in endings]

    def _volume(self, entry: dict[str, Any], kind: str) -> Any:
        """Returns the volume or the labels of a case."""
        dtype = np.dtype(entry["label_type"] if kind == "labels" else "uint8")
        if entry["format"] == "plain":
            return self._array(entry, kind, (dtype.type,), entry["shape"])
        table = self._array(entry, kind, (np.int64,), ending="chunks.npy")
        path = self.folder / f"{entry['file']}.{kind}.b2"
        self._check_unchanged(path)
        return ChunkedArray(path, np.array(table), entry["shape"], dtype)

    def _array(
        self, entry: dict[str, Any], kind: str, dtypes: tuple[Any, ...], shape: list[int] | None = None,
        ending: str = "npy",
    ) -> np.ndarray:  # fmt: skip
        """Returns a memory-mapped array of a case; its checksum is compared where it was not yet.

        Raises:
            InputError: The file is missing, or is not what was written.
        """
        path = self.folder / f"{entry['file']}.{kind}.{ending}"
        known = path in self._seen
        self._check_unchanged(path)
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError, SyntaxError) as error:
            raise InputError(
                "a file of a training cache is damaged or missing", where=str(path), hint=_REBUILD
            ) from error
        as_written = shape is None or list(array.shape) == shape
        if array.dtype not in dtypes or not as_written or not (known or checksum(array) == entry["checksums"][kind]):
            raise InputError("a file of a training cache has changed", where=str(path), hint=_REBUILD)
        release_pages(array)
        return array

    def _check_unchanged(self, path: Path) -> None:
        """Compares a file with what it was when it was first opened.

        Raises:
            InputError: It is another file now, was written to, or is missing.
        """
        try:
            found = os.stat(path)
        except OSError as error:
            raise InputError(
                "a file of a training cache is damaged or missing", where=str(path), hint=_REBUILD
            ) from error
        now = (found.st_ino, found.st_size, found.st_mtime_ns)
        if self._seen.setdefault(path, now) != now:
            raise InputError("a file of a training cache has changed during the run", where=str(path), hint=_REBUILD)


def _kept(opened: OrderedDict[int, _Opened], i: int, value: _Opened) -> _Opened:
    """Keeps what was opened, and lets go of what was used the longest time ago."""
    opened[i] = value
    if len(opened) > _MOST_OPEN:
        opened.popitem(last=False)
    return value


def checksum(array: np.ndarray) -> str:
    """Returns the BLAKE2 digest of an array's values."""
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()


def is_entry(entry: Any, names: list[str]) -> bool:
    """Says whether an entry of an index has the form that `build_cache` writes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str) or not isinstance(entry.get("name"), str):
        return False
    lists = [entry.get(key) for key in ("annotated", "shape", "notes", "places")]
    sums = entry.get("checksums")
    if not all(isinstance(value, list) for value in lists) or not isinstance(sums, dict):
        return False
    return (
        re.fullmatch(r"\d{5,}", entry["file"]) is not None  # the name of a file in the cache, never a path
        and all(name in names for name in entry["annotated"])
        and len(entry["shape"]) == 3
        and all(type(side) is int and 0 < side < 2**20 for side in entry["shape"])
        and all(isinstance(note, str) for note in entry["notes"])
        and len(entry["places"]) == len(entry["annotated"])
        and all(type(count) is int and count >= 0 for count in entry["places"])
        and entry.get("format") in FORMATS
        and entry.get("label_type") in ("uint8", "uint16")
        and {"labels", "volume", "places", "blocks"} <= set(sums)
        and check_codes(entry.get("codes"), len(names))
    )
