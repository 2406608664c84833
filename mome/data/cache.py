"""Training cases on the network grid, windowed to uint8, as memory-mapped arrays on disk.

There is one folder per data set and settings. Its name contains a hash of both, so that a changed spacing, HU window or
scan gets a new cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mome.atomic import atomic_write
from mome.data.case_folder import Case, CaseFolder
from mome.errors import InputError
from mome.processing import MoMEProcessor
from mome.volumes import Grid, read_label_map, read_volume, resample
from mome.volumes.data_files import identity
from mome.volumes.label_map import listed_values, unnamed_values

logger = logging.getLogger(__name__)

LoadedCase = tuple[np.ndarray, Grid, dict[str, np.ndarray]]
"""HU (i, j, k), its grid, and a mask (i, j, k) for every annotated structure."""


@dataclass(frozen=True)
class CachedCase:
    """One case on the network grid.

    Attributes:
        name: The case's name.
        volume: uint8 (D, H, W); 0 and 255 are the ends of the HU window.
        labels: uint8 (D, H, W); 0, or 1 + the index of a structure among the cache's labels.
        annotated: Names of the structures annotated in this case.
        voxels: For every annotated structure, the flat indices of its voxels.
    """

    name: str
    volume: np.ndarray
    labels: np.ndarray
    annotated: tuple[str, ...]
    voxels: dict[str, np.ndarray]


class CaseCache:
    """The cached cases of one source.

    Args:
        folder: Folder of the cache. Only its index is read; arrays are opened when a case is asked for.
        names: Labels that the cache numbers from 1.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.label_names = names
        self.index: list[dict[str, Any]] = json.loads((folder / "index.json").read_text())["cases"]
        self._open: dict[int, CachedCase] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> CachedCase:
        if i not in self._open:
            entry = self.index[i]
            path = self.folder / entry["file"]
            labels = np.load(path.with_suffix(".labels.npy"), mmap_mode="r")
            flat = np.asarray(labels).ravel()
            voxels = {
                name: np.flatnonzero(flat == self.label_names.index(name) + 1).astype(np.int32)
                for name in entry["annotated"]
            }
            volume = np.load(path.with_suffix(".volume.npy"), mmap_mode="r")
            self._open[i] = CachedCase(entry["name"], volume, labels, tuple(entry["annotated"]), voxels)
        return self._open[i]


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
        InputError: More labels than a uint8 map can number.
        OutputError: The cache cannot be written; a partial one is removed.
    """
    if len(names) > 254:
        raise InputError(f"a cache holds at most 254 labels, got {len(names)}", hint="train on fewer structures")
    key = json.dumps([processor.settings(), names, fingerprint], sort_keys=True)
    folder = Path(root) / f"{source}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if (folder / "index.json").is_file():
        return CaseCache(folder, names)
    index = []
    with atomic_write(folder, "the cache of training cases") as part:
        part.mkdir()
        for number, (name, load) in enumerate(progress(list(cases))):
            hu, grid, masks = load()
            target = processor.network_grid(grid)
            array = torch.as_tensor(hu, dtype=torch.float32)
            volume = processor.window(resample(array, grid, target, fill=processor.padding_hu))
            labels = _label_map(masks, names, grid, target)
            file = f"{number:05d}"  # not the case's name, which may identify the patient
            np.save(part / f"{file}.volume.npy", (volume * 255).round().to(torch.uint8).numpy())
            np.save(part / f"{file}.labels.npy", labels)
            annotated = [label for label in names if label in masks]
            index.append({"file": file, "name": name, "annotated": annotated, "shape": list(labels.shape)})
        settings = {"settings": processor.settings(), "names": names, "cases": index}
        (part / "index.json").write_text(json.dumps(settings))
    return CaseCache(folder, names)


def _label_map(masks: dict[str, np.ndarray], names: list[str], grid: Grid, target: Grid) -> np.ndarray:
    """One label map (D, H, W) of all masks on the network grid.

    Masks are resampled as soft masks. A voxel gets the structure that covers most of it, if that is at least half.
    """
    best = torch.full(tuple(target.shape), 0.5)
    labels = torch.zeros(tuple(target.shape), dtype=torch.uint8)
    for number, name in enumerate(names, start=1):
        if name not in masks:
            continue
        soft = resample(torch.as_tensor(masks[name], dtype=torch.float32), grid, target, fill=0.0)
        wins = soft >= best
        labels[wins] = number
        best = torch.where(wins, soft, best)
    return labels.numpy()


def cache_case_folder(
    root: str | Path,
    folder: CaseFolder,
    source: str,
    names: list[str],
    processor: MoMEProcessor,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> CaseCache:
    """Opens the cache of a folder of cases; builds it if there is none, or if a file has changed.

    A warning names every case whose label map has values without a name, or has no voxel of an annotated structure.

    Args: See `build_cache`.

    Raises:
        InputError: A scan and its label map are on different grids, a file cannot be read, a label map holds numbers
            that are not whole, or it holds other values only and no annotated structure.
        OutputError: The cache cannot be written.
    """

    def loader(case: Case) -> Callable[[], LoadedCase]:
        def load() -> LoadedCase:
            volume, labels = read_volume(case.image), read_label_map(case.labels)
            if not volume.grid.same_as(labels.grid, tolerance=0.01):
                raise InputError(
                    "image and label map are on different grids: " + volume.grid.difference(labels.grid),
                    where=str(case.labels),
                    hint="resample the label map to the image's grid, by nearest neighbour",
                )
            masks = {name: labels.array == folder.ids[name] for name in case.annotated}
            _say_what_is_odd(case, labels.array, folder.ids, masks)
            return volume.array, volume.grid, masks

        return load

    pairs = [(case.name, loader(case)) for case in folder]
    files = [list(identity(path).values()) for case in folder for path in (case.image, case.labels)]
    fingerprint = json.dumps([[(case.name, case.annotated) for case in folder], files, folder.ids], sort_keys=True)
    return build_cache(root, source, names, processor, pairs, fingerprint, progress)


def _say_what_is_odd(case: Case, array: np.ndarray, ids: dict[str, int], masks: dict[str, np.ndarray]) -> None:
    """Warns of values without a name and of annotated structures without a voxel.

    Raises:
        InputError: No annotated structure has a voxel, and the map holds other values: its numbers are another data
            set's.
    """
    unnamed = unnamed_values(array, ids.values())
    empty = [name for name, mask in masks.items() if not mask.any()]
    if unnamed and masks and len(empty) == len(masks):
        raise InputError(
            f"the label map has no voxel of {', '.join(empty[:3])}; its value {listed_values(unnamed)} has no name",
            where=str(case.labels),
            hint="is the dataset of this source right?",
        )
    if unnamed:
        logger.warning("%s: no structure has the value %s, which is left out", case.labels, listed_values(unnamed))
    if empty:
        logger.warning("%s: annotated, without a voxel: %s", case.labels, ", ".join(empty))
