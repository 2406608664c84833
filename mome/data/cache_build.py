"""Writes training cases on the network grid, windowed to uint8, as arrays on disk; `mome.data.cache` opens them.

Arrays are plain, or compressed in chunks by Blosc2.

There is one folder per data set and settings. Its name contains a hash of both, so that a changed spacing, HU window or
scan gets a new cache. A build that was interrupted goes on with the first case that is not finished.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mome.atomic import atomic_write, check_output_folder, output_errors
from mome.data.cache import FORMATS, CaseCache, checksum, is_entry
from mome.data.case import Case
from mome.data.chunked_array import load_blosc2, write_chunks
from mome.data.label_codes import encoded
from mome.data.structure_places import blocks_of, places_of
from mome.data.training_labels import check_image
from mome.errors import InputError, did_you_mean
from mome.folder_lock import folder_lock
from mome.processing import MoMEProcessor
from mome.temporary_names import remove_stale_parts
from mome.text_file import read_json
from mome.volumes import Grid, resample
from mome.volumes.data_files import identity

_VERSION = 4  # of the files in a cache; part of the hash
_WAIT_S = 3600.0  # for another process that builds a cache in the same folder


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


def build_cache(
    root: str | Path,
    source: str,
    names: list[str],
    processor: MoMEProcessor,
    cases: Iterable[tuple[str, Callable[[], LoadedCase]]],
    fingerprint: str,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
    *,
    skip_broken: bool = False,
    workers: int = 1,
    cache_format: str = "plain",
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
        skip_broken: Leave out cases that cannot be used, and list them in `problems.json`. Else the first of them is
            an error.
        workers: Threads that read cases at once; each holds one scan in memory.
        cache_format: `plain` (memory-mapped arrays) or `blosc2` (compressed chunks).

    Raises:
        InputError: There is no such format, its package is not installed, there are more labels than a uint8 map can
            number, the cache is damaged, its folder cannot be written, or another process builds in it for an hour.
        OutputError: The cache cannot be written; finished cases stay for the next try.
    """
    if len(names) > 254:
        raise InputError(f"a cache holds at most 254 labels, got {len(names)}", hint="train on fewer structures")
    check_format(cache_format)
    key = json.dumps([_VERSION, cache_format, processor.settings(), names, fingerprint], sort_keys=True)
    folder = Path(root) / f"{source}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if (folder / "index.json").is_file():
        return CaseCache(folder, names)
    check_output_folder(root)
    with output_errors(root, "the folder of training caches"):
        Path(root).mkdir(parents=True, exist_ok=True)
    with folder_lock(root, wait_s=_WAIT_S) as is_free:
        if not is_free:
            raise InputError(
                f"another process has been building caches here for {_WAIT_S / 60:.0f} minutes",
                where=str(root),
                hint="wait for it, or another cache=…",
            )
        remove_stale_parts(root)
        if not (folder / "index.json").is_file():  # another process may have built it while this one waited
            _write_cache(folder, names, processor, list(cases), progress, skip_broken, workers, cache_format)
    return CaseCache(folder, names)


def check_format(cache_format: str) -> None:
    """Checks that caches can be stored in a format here.

    Raises:
        InputError: There is no such format, or its package is not installed.
    """
    if cache_format not in FORMATS:
        close = did_you_mean(cache_format[:60], FORMATS)
        raise InputError(f"unknown cache_format {cache_format!r:.60}{close}", hint="plain or blosc2")
    if cache_format == "blosc2":
        load_blosc2()


def _write_cache(
    folder: Path,
    names: list[str],
    processor: MoMEProcessor,
    cases: list[tuple[str, Callable[[], LoadedCase]]],
    progress: Callable[[Iterable[Any]], Iterable[Any]],
    skip_broken: bool,
    workers: int,
    cache_format: str,
) -> None:
    """Writes the cache of all cases into `<folder>.building`, which is then renamed.

    Raises:
        InputError: A case cannot be used and is not to be skipped, or no case can.
        OutputError: The cache cannot be written; finished cases stay for the next try.
    """
    part = folder.with_name(f"{folder.name}.building")
    entries: list[dict[str, Any]] = []
    problems: dict[str, str] = {}
    with output_errors(folder, "the cache of training cases"):
        part.mkdir(exist_ok=True)
        try:
            made = _made(part, names, processor, cases, skip_broken, workers, cache_format)
            for (name, _), (entry, reason) in zip(progress(cases), made, strict=True):
                if entry is None:
                    problems[name] = reason
                else:
                    entries.append(entry)
        except InputError:  # the user mends the case, which makes another cache
            shutil.rmtree(part, ignore_errors=True)
            raise
        if problems and not entries:
            shutil.rmtree(part, ignore_errors=True)
            name, reason = next(iter(problems.items()))
            raise InputError(f"no case can be used; {name!r:.60}: {reason.splitlines()[0]}", where=str(folder.parent))
        if problems:
            (part / "problems.json").write_text(json.dumps(problems, indent=1) + "\n")
        settings = {"settings": processor.settings(), "names": names, "cases": entries}
        (part / "index.json").write_text(json.dumps(settings))
        for path in part.glob("*.entry.json"):
            path.unlink()
        if folder.exists():  # without an index, or it would have been opened
            shutil.rmtree(folder)
        part.rename(folder)


def _made(
    part: Path,
    names: list[str],
    processor: MoMEProcessor,
    cases: list[tuple[str, Callable[[], LoadedCase]]],
    skip_broken: bool,
    workers: int,
    cache_format: str,
) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """Yields the entry of every case in order, or None and the reason where it cannot be used."""

    def make(number: int) -> tuple[dict[str, Any] | None, str]:
        name, load = cases[number]
        try:
            return _write_case(part, number, name, load, names, processor, cache_format), ""
        except InputError as error:
            if not skip_broken:
                raise
            return None, str(error)

    if workers <= 1:
        yield from map(make, range(len(cases)))
        return
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(make, range(len(cases)))
        finally:
            pool.shutdown(cancel_futures=True)


def _write_case(
    part: Path,
    number: int,
    name: str,
    load: Callable[[], LoadedCase],
    names: list[str],
    processor: MoMEProcessor,
    cache_format: str,
) -> dict[str, Any]:
    """Writes the arrays of one case and returns its entry of the index; what an earlier build wrote is kept.

    Raises:
        InputError: The case cannot be used.
    """
    file = f"{number:05d}"  # not the case's name, which may identify the patient
    record = part / f"{file}.entry.json"
    if record.is_file():
        entry = read_json(record, "an entry of a training cache", hint=f"remove {part}")
        if is_entry(entry, names) and entry["name"] == name:
            return entry
    case = load()
    target = processor.network_grid(case.grid)
    array = torch.as_tensor(case.hu, dtype=torch.float32)
    windowed = processor.window(resample(array, case.grid, target, fill=processor.padding_hu))
    volume = (windowed * 255).round().to(torch.uint8).numpy()
    labels, codes = encoded(case.masks, names, case.grid, target)
    arrays = {"volume": volume, "labels": labels}
    named = [[names[number] for number in code] for code in codes]
    annotated = [label for label in names if label in case.masks]
    places = [places_of(labels, named, label) for label in annotated]
    arrays["places"] = np.concatenate([np.zeros(0, np.int32), *places])
    arrays["blocks"] = blocks_of(labels, named, annotated)
    sums = {
        kind: _write_array(part / f"{file}.{kind}", array, cache_format if kind in ("volume", "labels") else "plain")
        for kind, array in arrays.items()
    }
    entry = {
        "file": file,
        "name": name,
        "annotated": annotated,
        "codes": codes,
        "shape": list(labels.shape),
        "notes": list(case.notes),
        "places": [len(found) for found in places],
        "format": cache_format,
        "label_type": labels.dtype.name,
        "checksums": sums,
    }
    with atomic_write(record, "an entry of a training cache") as temporary:
        temporary.write_text(json.dumps(entry))
    return entry


def _write_array(stem: Path, array: np.ndarray, cache_format: str) -> str:
    """Writes an array and returns the checksum of its values, or of its table of chunks."""
    if cache_format == "plain":
        np.save(f"{stem}.npy", array)
        return checksum(array)
    table = write_chunks(array, Path(f"{stem}.b2"))
    np.save(f"{stem}.chunks.npy", table)
    return checksum(table)


def _identity(case: Case) -> list[Any]:
    """Returns all that decides what is read of a case, as JSON values."""
    rules = sorted((name, rule.values, rule.side) for name, rule in case.rules.items())
    masks = [(name, len(paths)) for name, paths in case.masks.items()]  # which of the files belong to which structure
    files = [list(identity(path).values()) for path in case.files]
    values = [sorted(case.named_values), sorted(case.ignored_values)]
    return [case.name, case.annotated, rules, masks, files, values]


def cache_case_folder(
    root: str | Path,
    cases: Iterable[Case],
    source: str,
    names: list[str],
    processor: MoMEProcessor,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
    *,
    skip_broken: bool = False,
    workers: int = 1,
    cache_format: str = "plain",
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
            notes += [f"case {case.name!r}: {note}" for note in volume.notes]
            if not set(case.annotated) & set(names):
                notes.append(f"case {case.name!r}: none of the trained structures is annotated")
            return LoadedCase(volume.array, volume.grid, masks, tuple(notes))

        return load

    fingerprint = json.dumps([_identity(case) for case in cases])
    loaders = [(case.name, loader(case)) for case in cases]
    return build_cache(
        root, source, names, processor, loaders, fingerprint, progress,
        skip_broken=skip_broken, workers=workers, cache_format=cache_format,
    )  # fmt: skip
