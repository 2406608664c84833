"""Opens the sources of training and validation cases: folders of scans, their caches, phantoms, or synthetic CT."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.progress import track

from mome.data.augmentation import BatchAugmentation
from mome.data.augmentations.base import PatchFrame
from mome.data.cache import CaseCache
from mome.data.cache_build import LoadedCase, build_cache, cache_case_folder
from mome.data.layouts import open_cases
from mome.data.phantom import PHANTOM_VERSION, phantom
from mome.data.sampling import PatchDataset
from mome.data.splits import part_of
from mome.errors import InputError
from mome.printable import printable
from mome.processing import MoMEProcessor
from mome.text_file import read_json
from mome.training.config import RunConfig, SourceConfig
from mome.training.first_process import Progress, first_then_others
from mome.training.synthetic_source import open_synthetic
from mome.volumes import Grid
from mome.volumes.orientation import left_right_axis

_MOST_NOTES = 8  # that are printed


def open_source(
    source: SourceConfig,
    run: RunConfig,
    processor: MoMEProcessor,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
    *,
    skip_broken: bool = False,
    workers: int = 1,
) -> CaseCache:
    """Returns the cached cases of one source; the cache is built on first use.

    Args:
        source: The source.
        run: Its `labels` and `cache` are used.
        processor: Decides the network grid and the HU window.
        progress: Wraps the iteration over cases while the cache is built, for a progress bar.
        skip_broken, workers: See `mome.data.cache_build.build_cache`; they concern folders of cases.

    Raises:
        InputError: An unknown kind of source, a missing folder, or cases that cannot be used.
    """
    if source.kind == "phantom":
        return _open_phantoms(source, run, processor, progress)
    if source.kind == "cases":
        return _open_case_folder(source, run, processor, progress, skip_broken, workers)
    if source.kind == "synthetic":
        return open_synthetic(source, run, processor, progress)
    if source.kind == "cached":
        return _open_cached(source, run, processor)
    raise InputError(f"unknown kind of source {source.kind!r}", hint="kind: cases, cached, phantom or synthetic")


def open_all_sources(
    run: RunConfig, processor: MoMEProcessor, accelerator: Accelerator
) -> tuple[list[CaseCache], list[CaseCache]]:
    """Returns the cached cases of all training sources, and those of the validation sources if the run validates.

    The main process builds the caches, the others open them. Notes on the cases are printed.

    Raises:
        InputError: There is no source, no case annotates a trained structure, the run validates without such a case,
            or a source cannot be opened.
    """
    if not run.sources:
        raise InputError("the configuration names no sources of training cases", hint="sources: [{kind: cases, …}]")
    validates = run.train.validate_every > 0
    if validates and not run.validation:
        raise InputError(
            f"train.validate_every is {run.train.validate_every}, and there are no validation cases",
            hint="validation: [{kind: cases, …}], or train.validate_every=0",
        )

    def shown(items: Iterable[Any]) -> Iterable[Any]:
        return track(items, "caching", transient=True)

    def opened(progress: Progress) -> tuple[list[CaseCache], list[CaseCache]]:
        validation = run.validation if validates else ()
        first, second = (
            [open_source(one, run, processor, progress) for one in some] for some in (run.sources, validation)
        )
        return first, second

    caches, validation = first_then_others(accelerator, opened, shown)
    _say_what_is_annotated(run, caches, validation, accelerator)
    return caches, validation


def _say_what_is_annotated(
    run: RunConfig, caches: list[CaseCache], validation: list[CaseCache], accelerator: Accelerator
) -> None:
    """Prints the notes on all cases, and the structures that no training case annotates.

    Raises:
        InputError: No training case, or no validation case, annotates a trained structure.
    """
    trained, validated = annotated_labels(drawn(caches, run)), annotated_labels(validation)
    wanted = f"labels: [{', '.join(run.labels)}]"
    if not trained:
        raise InputError(
            "no training case annotates one of the labels",
            where=wanted,
            hint="what is annotated: mome data check, or 'annotated' in cases.json",
        )
    if validation and not validated:
        raise InputError(
            "no validation case annotates one of the labels",
            where=wanted,
            hint="what is annotated: mome data check, or 'annotated' in cases.json",
        )
    notes = [note for cache in (*caches, *validation) for note in cache.notes]
    shared = _in_both(caches, validation)
    if shared:
        notes.insert(
            0,
            f"{len(shared)} validation cases are training cases, too, such as {shared[0]!r:.60}: their Dice says "
            "nothing of other scans",
        )
    missing = [name for name in run.labels if name not in trained]
    if missing:
        notes.insert(0, f"no training case annotates {', '.join(missing)}: nothing is learned of it")
    for note in notes[:_MOST_NOTES]:
        accelerator.print(f"note: {printable(note)}")
    if len(notes) > _MOST_NOTES:
        accelerator.print(f"note: {len(notes) - _MOST_NOTES} more are in index.json of the caches, in {run.cache}")


def _in_both(caches: list[CaseCache], validation: list[CaseCache]) -> list[str]:
    """Returns the names of the validation cases whose volume, by its checksum, is that of a training case."""
    trained = {entry["checksums"]["volume"] for cache in caches for entry in cache.index}
    return [entry["name"] for cache in validation for entry in cache.index if entry["checksums"]["volume"] in trained]


def drawn(caches: Sequence[CaseCache], run: RunConfig) -> list[CaseCache]:
    """Returns the caches of the training sources that are drawn at all: a source may have the weight 0."""
    return [cache for cache, source in zip(caches, run.sources, strict=True) if source.weight > 0]


def contents_of(caches: Sequence[CaseCache]) -> str:
    """Returns how the caches are stored and a checksum of the cases in them, as in "plain:5f1c…".

    The checksum is of the stored bytes, so that it says nothing about caches that are stored in another way.
    """
    cases = [[(entry["name"], entry["annotated"], entry["checksums"]) for entry in cache.index] for cache in caches]
    formats = sorted({str(entry["format"]) for cache in caches for entry in cache.index})
    return f"{','.join(formats)}:{_checksum(cases)}"


def names_of_cases(caches: Sequence[CaseCache], first: int = 0) -> str:
    """Returns a checksum of which cases the caches hold and what is annotated in them.

    Args:
        caches: One per source.
        first: How many cases of each source count; 0 counts all.
    """
    return _checksum(
        [[(entry["name"], entry["annotated"], entry["shape"]) for entry in cache.index[: first or None]]
         for cache in caches]
    )  # fmt: skip


def _checksum(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def annotated_labels(caches: Sequence[CaseCache]) -> set[str]:
    """Returns the structures that a case of the caches annotates."""
    return {name for cache in caches for entry in cache.index for name in entry["annotated"]}


def patch_dataset(
    run: RunConfig,
    caches: list[CaseCache],
    patch_size: Sequence[int],
    processor: MoMEProcessor,
    length: int,
    samples_per_step: int = 1,
) -> PatchDataset:
    """Returns the augmented training patches of a run.

    Args:
        run: The run.
        caches: One cache per source of the run.
        patch_size: Voxels (D, H, W).
        processor: Decides the network grid and the HU window.
        length: Number of patches of the whole run.
        samples_per_step: Patches of one optimiser step over all processes, which share their prompts.

    Raises:
        InputError: A setting of the sampling or of an augmentation cannot be used.
    """
    low, high = processor.hu_window
    frame = PatchFrame(
        spacing=tuple(map(float, processor.spacing)),  # type: ignore[arg-type]
        left_right_axis=left_right_axis(processor.orientation),
        height_axis=next(axis for axis, letter in enumerate(processor.orientation) if letter in "SI"),
        hu_window=(float(low), float(high)),
    )
    return PatchDataset(
        caches,
        [source.weight for source in run.sources],
        list(run.labels),
        patch_size,
        length,
        run.train.seed,
        run.sampling,
        BatchAugmentation(run.augmentation, run.labels, frame, run.train.seed),
        samples_per_step,
        frame.height_axis,
    )


def _open_case_folder(
    source: SourceConfig,
    run: RunConfig,
    processor: MoMEProcessor,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
    skip_broken: bool,
    workers: int,
) -> CaseCache:
    """Returns the cached cases of a folder of scans."""
    if not source.folder or (source.layout == "cases" and not source.dataset):
        raise InputError("a source of kind 'cases' needs a folder and a dataset", hint="dataset: openkbp")
    folder = Path(os.path.expandvars(source.folder)).expanduser()
    if not folder.exists():
        raise InputError("no such folder of training cases", where=str(folder))
    cases = part_of(open_cases(folder, source.layout, source.dataset, run.own_structures), source.part, source.held_out)
    if not cases:
        raise InputError(f"the part {source.part!r} of the cases is empty", where=str(folder), hint="held_out: 0.2")
    if source.count:
        cases = cases[: source.count]
    dataset = Path(source.dataset).stem if source.dataset else "cases"
    name = "".join(c if c.isalnum() else "-" for c in f"{dataset}-{folder.name}")
    return cache_case_folder(
        run.cache, cases, name, list(run.labels), processor, progress,
        skip_broken=skip_broken, workers=workers, cache_format=run.cache_format,
    )  # fmt: skip


def _open_cached(source: SourceConfig, run: RunConfig, processor: MoMEProcessor) -> CaseCache:
    """Returns a cache that another run has built, whose scans need not be here."""
    if not source.folder:
        raise InputError("a source of kind 'cached' needs a folder", hint="folder: cache/openkbp-train-0123456789ab")
    folder = Path(os.path.expandvars(source.folder)).expanduser()
    made = read_json(folder / "index.json", "the index of a training cache", hint="name one folder inside a cache")
    for what, ours in (("settings", processor.settings()), ("names", list(run.labels))):
        if made.get(what) != json.loads(json.dumps(ours)):
            raise InputError(
                f"the cache was made with other {'labels' if what == 'names' else 'processor settings'}",
                where=str(folder),
                hint=f"this run has {json.dumps(ours)!s:.200}",
            )
    try:
        return CaseCache(folder, list(run.labels))
    except InputError as error:  # its hint is to remove the folder, and the scans may not be here
        raise InputError(
            "the cache is damaged, or another release made it", where=str(folder), hint="make it again from the scans"
        ) from error


def _open_phantoms(
    source: SourceConfig,
    run: RunConfig,
    processor: MoMEProcessor,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> CaseCache:
    """Returns the cached cases of a source of phantoms."""
    if source.count < 1:
        raise InputError("a source of kind 'phantom' needs a count of at least 1", hint="count: 32")
    names = list(run.labels)

    def loader(seed: int) -> Callable[[], LoadedCase]:
        def load() -> LoadedCase:
            made = phantom(seed)
            masks: dict[str, np.ndarray] = {name: made.masks[name] for name in names if name in made.masks}
            return LoadedCase(made.array, Grid(made.array.shape, made.affine), masks)

        return load

    cases = [(f"phantom_{seed}", loader(seed)) for seed in range(source.seed, source.seed + source.count)]
    fingerprint = json.dumps([source.seed, source.count, PHANTOM_VERSION])
    return build_cache(
        run.cache, "phantom", names, processor, cases, fingerprint, progress, cache_format=run.cache_format
    )
