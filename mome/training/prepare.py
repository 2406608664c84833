"""From a folder of cases to a training configuration and its caches: `mome data prepare`."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from mome.atomic import atomic_write, check_output_folder, output_errors
from mome.data.cache import CaseCache
from mome.data.cache_build import check_format
from mome.data.check import check_named
from mome.data.fingerprint import Fingerprint, fingerprint
from mome.data.layouts import open_cases
from mome.data.plan import Plan, make_plan
from mome.data.splits import part_of
from mome.errors import InputError
from mome.labels.dataset_file import dataset_path, is_dataset_file, own_names
from mome.labels.own import read_own_structures
from mome.threads import container_cpus
from mome.training.config import RunConfig, SourceConfig
from mome.training.config_file import load_run_config
from mome.training.memory import BYTES_PER_AVERAGED_WEIGHT, BYTES_PER_WEIGHT, bytes_per_voxel
from mome.training.setup import build_processor
from mome.training.sources import open_source


class Prepared(NamedTuple):
    """What `prepare` made.

    Attributes:
        plan: The plan.
        path: The configuration.
        earlier: The new name of a configuration that was there and differed; None if there was none.
    """

    plan: Plan
    path: Path
    earlier: Path | None


def prepare(
    folder: str | Path,
    out: str | Path,
    *,
    layout: str | dict[str, Any] = "cases",
    dataset: str | None = None,
    labels: tuple[str, ...] = (),
    own: Sequence[str] = (),
    preset: str = "mome_ct_tiny",
    memory_bytes: float = 8e9,
    held_out: float = 0.2,
    skip_broken: bool = False,
    workers: int = 1,
    cache_format: str = "plain",
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> Prepared:
    """Reads the cases, plans a training, writes `<out>/run.yaml` and fills the caches in `<out>/cache`.

    A `run.yaml` that is there and differs becomes `run.before.yaml`, or `run.before.2.yaml` and so on.

    Args:
        folder: The folder of cases.
        out: The folder for the configuration, the fingerprint and the caches.
        layout: A name of `mome.data.layouts`.
        dataset: The data set whose numbers the label maps use, or a YAML file of one; None where the folder names
            them.
        labels: The structures to train; empty takes all that occur.
        own: Structures that the class table does not have, which the folder may name.
        preset: The model's preset.
        memory_bytes: Memory of the device that will train.
        held_out: Share of the patients that are held out for validation.
        skip_broken: Leave out cases that cannot be used; `problems.json` names them. Else the first is an error.
        workers: Threads that read cases at once.
        cache_format: How the caches are stored; see `mome.data.cache_build.build_cache`.
        progress: Wraps the iteration over cases, for a progress bar.

    Returns:
        See `Prepared`.

    Raises:
        InputError: The folder, a case or a setting cannot be used.
        OutputError: A file cannot be written.
    """
    check_output_folder(out)
    check_format(cache_format)
    out, folder = Path(out), Path(folder)
    asked = dict.fromkeys([*own, *own_names(dataset)])
    structures: dict[str, list[str]] = {name: [] for name in read_own_structures(asked)}
    if dataset is not None and is_dataset_file(dataset):
        dataset = str(dataset_path(dataset).resolve())
    cases = open_cases(folder, layout, dataset, structures)
    check_named((*own, *labels), cases, folder)
    val, train = (part_of(cases, part, held_out) for part in ("val", "train"))
    if not train:
        raise InputError(
            f"none of the {len(cases)} cases is left for training", where=str(folder), hint="a smaller --held-out"
        )
    found = fingerprint(cases, progress)
    if found.problems and not skip_broken:
        name, reason = next(iter(found.problems.items()))
        raise InputError(
            f"{len(found.problems)} of {len(cases)} cases cannot be used; {name!r:.60}: {reason.splitlines()[0]}",
            where=str(folder),
            hint="mend them (mome data check), or --skip-broken",
        )
    # Cases that are kept for validation or a test decide nothing.
    planned = found.of({case.name for case in train})
    names = labels or tuple(planned.structures)
    if not names:
        raise InputError(
            "no training case annotates a structure with a voxel", where=str(folder), hint="mome data check"
        )
    plan = _plan(planned, preset, len(names), memory_bytes)
    source = SourceConfig(
        folder=str(folder.resolve()),
        layout=layout,
        dataset=dataset,
        # the part `all` would hold cases that the data keep for a test, too
        part="train" if len(train) < len(cases) else "all",
        held_out=held_out,
    )
    path = out / "run.yaml"
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "fingerprint.json", "the fingerprint") as temporary:
        summary = {**found.summary(), "without_voxels": _without_voxels(found, planned)}
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
    text = _configuration(plan, preset, structures, names, source, bool(val), out, len(cases), cache_format)
    earlier = None
    if path.is_file() and path.read_bytes() != text.encode():  # a user may have changed it
        earlier = _free_name(out)
        with output_errors(out, "the earlier training configuration"):
            os.replace(path, earlier)
    with atomic_write(path, "the training configuration") as temporary:
        temporary.write_text(text)
    run = load_run_config(path, [])
    for each in (*run.sources, *run.validation):
        _fill(each, run, skip_broken, workers, progress)
    return Prepared(plan, path, earlier)


def _free_name(out: Path) -> Path:
    """Returns a name for an earlier configuration that no file has."""
    endings = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    return next(path for ending in endings if not (path := out / f"run.before{ending}.yaml").exists())


def _without_voxels(found: Fingerprint, planned: Fingerprint) -> list[str]:
    """Returns the structures that a case annotates and of which no training case has a voxel."""
    annotated = (name for case in found.cases for name in case.volumes_ml)
    return [name for name in dict.fromkeys(annotated) if name not in planned.structures]


def _fill(
    source: SourceConfig,
    run: RunConfig,
    skip_broken: bool,
    workers: int,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> CaseCache:
    return open_source(source, run, build_processor(run, None), progress, skip_broken=skip_broken, workers=workers)


def _plan(found: Fingerprint, preset: str, prompts: int, memory_bytes: float) -> Plan:
    """Returns the plan for a preset, whose memory is measured on a small patch."""
    from mome.zoo import create_model

    torch.manual_seed(0)
    model = create_model(preset, labels=list(found.structures), text_encoder="bank(width=32)", text_dim=None)
    per_weight = BYTES_PER_WEIGHT + BYTES_PER_AVERAGED_WEIGHT  # the configuration that is written has an average
    weights = sum(parameter.numel() for parameter in model.parameters()) * per_weight
    return make_plan(found, memory_bytes - weights, bytes_per_voxel(model, prompts), model.encoder.size_divisor)


def _configuration(
    plan: Plan,
    preset: str,
    structures: dict[str, list[str]],
    names: tuple[str, ...],
    source: SourceConfig,
    validates: bool,
    out: Path,
    cases: int,
    cache_format: str,
) -> str:
    """Returns the text of the training configuration."""
    kept: dict[str, Any] = {"kind": "cases", "folder": source.folder, "layout": source.layout}
    if source.dataset:
        kept["dataset"] = source.dataset
    if source.part != "all":
        kept |= {"part": source.part, "held_out": source.held_out}
    values: dict[str, Any] = {
        "preset": preset,
        "model": {"patch_size": list(plan.patch_size)},
        "processor": {"spacing": list(plan.spacing), "hu_window": list(plan.hu_window)},
        **({"structures": structures} if structures else {}),
        "labels": list(names),
        "cache": str((out / "cache").resolve()),
        **({} if cache_format == "plain" else {"cache_format": cache_format}),
        "sources": [kept],
        **({"validation": [{**kept, "part": "val"}]} if validates else {}),
        "loss": "bce_dice(positive_weight=5)",
        "train": {
            "samples": 20000,
            "batch_size": plan.batch_size,
            "mixed_precision": "bf16" if torch.cuda.is_available() else "no",
            "workers": min(8, container_cpus() // 2)
            if torch.cuda.is_available()
            else 0,  # a GPU would wait for patches
            "ema": 0.995,
            "validate_every": 500 if validates else 0,
            "out": str((out / "run").resolve()),
        },
    }
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120)
    head = (
        f"# Made by `mome data prepare` from {cases} cases. A step of {plan.batch_size} patches is expected to need "
        f"{plan.step_bytes / 1e9:.1f} GB\n# beside the weights. Everything here may be changed: "
        "python -m pydoc mome.training.config\n"
    )
    return head + text
