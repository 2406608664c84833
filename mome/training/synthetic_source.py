"""Opens a source of synthetic CT, which is made from one label map."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from mome.data.cache import CaseCache
from mome.data.cache_build import LoadedCase, build_cache
from mome.data.synthetic import SYNTHETIC_VERSION, Anatomy, load_anatomy, synthetic_ct
from mome.errors import InputError
from mome.labels import load_dataset
from mome.processing import MoMEProcessor
from mome.training.config import RunConfig, SourceConfig
from mome.volumes import Grid
from mome.volumes.data_files import identity


def open_synthetic(
    source: SourceConfig,
    run: RunConfig,
    processor: MoMEProcessor,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> CaseCache:
    """Returns the cached scans of a synthetic source.

    Raises:
        InputError: A setting or a file is missing, or the anatomy cannot be used.
    """
    if not source.label_map or not source.dataset or source.count < 1:
        raise InputError(
            "a source of kind 'synthetic' needs a label_map, a dataset and a count of at least 1",
            hint="{kind: synthetic, label_map: map.nii.gz, dataset: totalsegmentator_v2, count: 16}",
        )
    label_map, image = _file(source.label_map), _file(source.image) if source.image else None
    names = list(run.labels)

    @lru_cache(maxsize=1)  # read only when the cache is built
    def anatomy() -> Anatomy:
        return load_anatomy(label_map, str(source.dataset), image, source.unknown)

    def loader(seed: int) -> Callable[[], LoadedCase]:
        def load() -> LoadedCase:
            made = synthetic_ct(anatomy(), seed, names=names, real=source.real)
            return LoadedCase(made.array, Grid(made.array.shape, made.affine), made.masks)

        return load

    stem = "".join(c if c.isalnum() else "-" for c in label_map.name.split(".")[0])
    cases = [(f"{stem}_{seed}", loader(seed)) for seed in range(source.seed, source.seed + source.count)]
    files = [list(identity(path).values()) for path in (label_map, image) if path is not None]
    made_from = [files, source.dataset, load_dataset(source.dataset).name_to_id, list(source.unknown), source.real]
    fingerprint = json.dumps([SYNTHETIC_VERSION, source.seed, source.count, made_from], sort_keys=True)
    return build_cache(
        run.cache, f"synthetic-{stem}", names, processor, cases, fingerprint, progress, cache_format=run.cache_format
    )


def _file(path: str) -> Path:
    """Returns a path with its variables expanded.

    Raises:
        InputError: There is no such file.
    """
    found = Path(os.path.expandvars(path)).expanduser()
    if not found.is_file():
        raise InputError("no such file of a synthetic source", where=str(found))
    return found
