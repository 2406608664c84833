"""Training cases on the network grid, windowed to uint8, as memory-mapped arrays on disk.

There is one folder per data set and settings. Its name contains a hash of both, so that a changed spacing, HU window or
scan gets a new cache. `index.json` holds a checksum of every array, which is compared when the array is first used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mome.atomic import atomic_write, check_output_folder, output_errors
from mome.data.case import Case
from mome.data.label_codes import check_codes, encoded, voxels_of
from mome.data.training_labels import check_image
from mome.errors import InputError
from mome.folder_lock import folder_lock
from mome.processing import MoMEProcessor
from mome.temporary_names import remove_stale_parts
from mome.text_file import read_json
from mome.volumes import Grid, resample
from mome.volumes.data_files import identity

_VERSION = 3  # of the files in a cache; part of the hash
_WAIT_S = 3600.0  # for another process that builds a cache in the same folder
_REBUILD = "remove this folder; the next run builds it again"


@dataclass(frozen=True)
class LoadedCase:
    """One case on its own grid.

    Attributes:
        hu: HU (i, j, k).
        grid: The grid of `hu`.
        masks: For every annotated structure, a mask (i, j, k).
        notes: Sentences for the user about the case.
    """

    hu: np.ndarray
    grid: Grid
    masks: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CachedCase:
    """One case on the network grid.

    Attributes:
        name: The case's name.
        volume: uint8 (D, H, W); 0 and 255 are the ends of the HU window.
        labels: uint8 or uint16 (D, H, W); codes of the sets of structures that a voxel belongs to.
        codes: Code → names of the structures; code 0 is none. Structures may overlap, as a liver and its tumour.
        annotated: Names of the structures annotated in this case.
        voxels: For every annotated structure, the flat indices of its voxels.
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
        index: For every case: `file`, `name`, `annotated`, `shape`, `notes` and `checksums`.

    Raises:
        InputError: The index is damaged.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.label_names = names
        path = folder / "index.json"
        cases = read_json(path, "the index of a training cache", hint=_REBUILD).get("cases")
        if not isinstance(cases, list) or not all(_is_entry(entry, names) for entry in cases):
            raise InputError("the index of a training cache is damaged", where=str(path), hint=_REBUILD)
        self.index: list[dict[str, Any]] = cases
        self._open: dict[int, CachedCase] = {}

    def __len__(self) -> int:
        return len(self.index)

    @property
    def notes(self) -> list[str]:
        """Sentences for the user about the cases, such as annotated structures without a voxel."""
        return [note for entry in self.index for note in entry["notes"]]

    def __getitem__(self, i: int) -> CachedCase:
        """Returns a case.

        Raises:
            InputError: Its arrays are damaged or missing.
        """
        if i not in self._open:
            entry = self.index[i]
            labels, volume = self._array(entry, "labels"), self._array(entry, "volume")
            codes = tuple(tuple(self.label_names[n] for n in code) for code in entry["codes"])
            voxels = {name: voxels_of(labels, codes, name) for name in entry["annotated"]}
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
        as_written = (list(array.shape), _checksum(array)) == (entry["shape"], entry["checksums"][kind])
        if array.dtype not in dtypes or not as_written:
            raise InputError("a file of a training cache has changed", where=str(path), hint=_REBUILD)
        return array


def _checksum(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()


def _is_entry(entry: Any, names: list[str]) -> bool:
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


def build_cache(
    root: str | Path,
    source: str,
    names: list[str],
    processor: MoMEProcessor,
    cases: Iterable[tuple[str, Callable[[], LoadedCase]]],
    fingerprint: str,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> CaseCache:
    """Opens the cache of a source; builds it if there is none.

    Args:
        root: Folder of all caches.
        source: Name of the source, with which the folder's name starts.
        names: Labels that the cache numbers from 1; other structures are left out.
        processor: Decides the network grid and the HU window.
        cases: (name, loader) pairs; a loader is called only when the cache is built.
        fingerprint: Anything else that the contents depend on, such as the dates of the files.
        progress: Wraps the iteration over cases, for a progress bar.

    Raises:
        InputError: More labels than a uint8 map can number, the cache is damaged, or its folder cannot be written.
        OutputError: The cache cannot be written; a partial one is removed.
    """
    if len(names) > 254:
        raise InputError(f"a cache holds at most 254 labels, got {len(names)}", hint="train on fewer structures")
    key = json.dumps([_VERSION, processor.settings(), names, fingerprint], sort_keys=True)
    folder = Path(root) / f"{source}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if (folder / "index.json").is_file():
        return CaseCache(folder, names)
    check_output_folder(root)
    with output_errors(root, "the folder of training caches"):
        Path(root).mkdir(parents=True, exist_ok=True)
    with folder_lock(root, wait_s=_WAIT_S):
        remove_stale_parts(root)
        if not (folder / "index.json").is_file():  # another process may have built it while this one waited
            _write_cache(folder, names, processor, progress(list(cases)))
    return CaseCache(folder, names)


def _write_cache(
    folder: Path,
    names: list[str],
    processor: MoMEProcessor,
    cases: Iterable[tuple[str, Callable[[], LoadedCase]]],
) -> None:
    """Writes the cache of all cases.

    Raises:
        InputError: A case cannot be used.
        OutputError: The cache cannot be written; a partial one is removed.
    """
    index = []
    with atomic_write(folder, "the cache of training cases") as part:
        part.mkdir()
        for number, (name, load) in enumerate(cases):
            case = load()
            target = processor.network_grid(case.grid)
            array = torch.as_tensor(case.hu, dtype=torch.float32)
            windowed = processor.window(resample(array, case.grid, target, fill=processor.padding_hu))
            volume = (windowed * 255).round().to(torch.uint8).numpy()
            labels, codes = encoded(case.masks, names, case.grid, target)
            file = f"{number:05d}"  # not the case's name, which may identify the patient
            np.save(part / f"{file}.volume.npy", volume)
            np.save(part / f"{file}.labels.npy", labels)
            index.append(
                {
                    "file": file,
                    "name": name,
                    "annotated": [label for label in names if label in case.masks],
                    "codes": codes,
                    "shape": list(labels.shape),
                    "notes": list(case.notes),
                    "checksums": {"volume": _checksum(volume), "labels": _checksum(labels)},
                }
            )
        settings = {"settings": processor.settings(), "names": names, "cases": index}
        (part / "index.json").write_text(json.dumps(settings))


def cache_case_folder(
    root: str | Path,
    cases: Iterable[Case],
    source: str,
    names: list[str],
    processor: MoMEProcessor,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> CaseCache:
    """Opens the cache of a folder of cases; builds it if there is none, or if a file has changed.

    Args: See `build_cache`.

    Raises:
        InputError: A scan and its label map are on different grids, a file cannot be read, a scan has one value only,
            labels are no whole numbers, or no structure annotated in a case has a voxel.
        OutputError: The cache cannot be written.
    """
    cases = list(cases)

    def loader(case: Case) -> Callable[[], LoadedCase]:
        def load() -> LoadedCase:
            volume = case.read_image()
            check_image(volume.array, case.name, case.image)
            masks, notes = case.read_masks(volume.grid)
            if not set(case.annotated) & set(names):
                notes.append(f"case {case.name!r}: none of the trained structures is annotated")
            return LoadedCase(volume.array, volume.grid, masks, tuple(notes))

        return load

    files = [list(identity(path).values()) for case in cases for path in case.files]
    rules = [sorted((name, rule.values, rule.side) for name, rule in case.rules.items()) for case in cases]
    fingerprint = json.dumps([[(case.name, case.annotated) for case in cases], files, rules])
    return build_cache(root, source, names, processor, [(c.name, loader(c)) for c in cases], fingerprint, progress)
