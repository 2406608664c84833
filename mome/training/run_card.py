"""What the card of a trained model says of its training: the data and their terms, the cases, and the length.

Neither a path nor the name of a case is in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from mome.data.cache import CaseCache
from mome.errors import InputError
from mome.labels.dataset import LabelMap
from mome.labels.dataset_file import open_dataset
from mome.model_card import cell, plain, training_section
from mome.training.config import RunConfig, SourceConfig


def run_section(run: RunConfig, caches: Sequence[CaseCache], steps: int, per_step: int) -> str:
    """Returns the section on a run.

    Args:
        run: The run.
        caches: The cases of its training sources.
        steps: Optimiser steps.
        per_step: Patches of a step over all processes.
    """
    pairs = [(source, cache) for source, cache in zip(run.sources, caches, strict=True) if source.weight > 0]
    config = run.train
    precision = "float32" if config.mixed_precision == "no" else f"mixed ({config.mixed_precision})"
    lines = [
        f"At most {steps:,} steps of {per_step} patches, seed {config.seed}, precision {precision}, loss "
        f"`{plain(run.loss if isinstance(run.loss, str) else run.loss.get('name', ''))}`.",
        "",
        "| data | cases | licence | source |",
        "|---|---|---|---|",
        *(f"| {_row(source, cache)} |" for source, cache in pairs),
        "",
        "| structure | cases that annotate it |",
        "|---|---|",
    ]
    for name in run.labels:
        count = sum(name in entry["annotated"] for _, cache in pairs for entry in cache.index)
        lines.append(f"| {cell(name.replace('_', ' '))} | {count or 'none: nothing was learned of it'} |")
    return training_section(lines)


def validation_section(step: int, score: float) -> str:
    """Returns the section on the validation that chose a model."""
    return (
        f"## Validation\nMean Dice {score:.3f} after {step:,} steps, over the validation cases of the run, on the "
        "network's grid\nand without overlapping tiles. `mome evaluate` gives scores to compare with others."
    )


def _row(source: SourceConfig, cache: CaseCache) -> str:
    """The cells of one source."""
    count = f"{len(cache):,}"
    if source.kind == "phantom":
        return " | ".join(["drawn shapes (phantoms)", count, "none needed", "`mome`"])
    found = _dataset(source)
    name = cell(found.name) if found is not None else "not described in the configuration"
    terms = [cell(found.licence or "not stated"), cell(found.citation or found.get)] if found else ["not stated", ""]
    return " | ".join([f"CT made from label maps of {name}" if source.kind == "synthetic" else name, count, *terms])


def _dataset(source: SourceConfig) -> LabelMap | None:
    """The data set of a source; None where its masks say what they are, or a cache of another run does not say."""
    if not source.dataset:
        return None
    try:
        return open_dataset(source.dataset)
    except InputError:  # a cache is opened without its data set, which may be a file of another machine
        return None
