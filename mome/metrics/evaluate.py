"""Evaluation of folders of masks: per case and structure, then per structure with confidence intervals."""

from __future__ import annotations

import logging
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mome.errors import InputError
from mome.labels import load_table
from mome.labels.dataset_file import open_dataset
from mome.labels.own import own_label
from mome.metrics.files import Files, find_masks, is_map_without_table, masked_and_mapped, open_masks, pair_files
from mome.metrics.overlap import dice
from mome.metrics.surface import hausdorff95, normalized_surface_dice
from mome.volumes import Volume
from mome.volumes.boxes import bounding_box
from mome.volumes.case_list import read_case_list
from mome.volumes.grid import SMALLEST_SHEAR
from mome.volumes.reordered import reordered

logger = logging.getLogger(__name__)
_HINT_PARTIAL = "evaluate -p NAME scores a structure alone, --partial what was predicted"


@dataclass(frozen=True)
class Score:
    """Scores of one structure in one case. They are NaN if both masks are empty.

    Attributes:
        case: Name of the case.
        structure: Name of the structure.
        dice: Dice coefficient.
        nsd: Normalised surface Dice.
        hd95: 95th percentile Hausdorff distance in mm.
    """

    case: str
    structure: str
    dice: float
    nsd: float
    hd95: float


# A larger share of an image that a mask fills is doubted (our choice); lungs fill a third of a scan of the chest.
_LARGEST_SHARE = 0.9


def evaluate_folder(
    prediction: str | Path,
    reference: str | Path,
    *,
    dataset: str | None = None,
    cases: str | Path | None = None,
    structures: str | Sequence[str] | None = None,
    on_missing: Callable[[str, str | None], None] | None = None,
    tolerance: float = 2.0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> list[Score]:
    """Scores every structure of every case of the reference.

    For each case, a folder (or single file) holds either masks `<case>_<structure>.nii.gz` or one label map
    `<case>.nii.gz`. The names of a label map's numbers come from the table in its header, or from `dataset` if it has
    none. Two single files are compared whatever their names are. Masks are read one structure at a time.

    Args:
        prediction, reference: Folders or files.
        dataset: Whose numbers label maps without a table use: a data set of the package, as in "openkbp", or a YAML
            file of one.
        cases: A `cases.json` whose `annotated` lists say what is annotated in each case; only this is scored.
        structures: Scores only these, by name or synonym.
        on_missing: Called with a case and a structure (None for the whole case) of the reference that has no
            prediction and is left out. If it is None, a missing prediction is an error, because a mean over the
            structures that happened to be predicted is misleading.
        tolerance: Tolerance of the surface Dice in mm.
        progress: Wraps the iteration over cases, for a progress bar.

    Returns:
        One `Score` per case and structure.

    Raises:
        InputError: A missing file, a case or structure without a prediction, nothing to score, or masks on different
            grids.
    """
    if dataset is not None:
        open_dataset(dataset)  # an unknown name is an error even where every map has a table of its own
    if Path(prediction).is_file() and Path(reference).is_file():
        predicted, wanted = pair_files(prediction, reference, dataset=dataset)
    else:
        wanted = find_masks(reference, dataset=dataset)
        predicted = find_masks(prediction, dataset=dataset, cases=list(wanted))
    if not wanted:
        raise InputError(
            "no masks to compare with",
            where=str(reference),
            hint="<case>.nii.gz or <case>_<structure>.nii.gz",
        )
    if not set(wanted) & set(predicted):
        raise InputError(
            "no case of the reference has a prediction: " + ", ".join([*list(wanted)[:3], "…"][: len(wanted)]),
            where=str(prediction),
            hint="files are matched by their names: <case>.nii.gz, <case>_<structure>.nii.gz",
        )
    available = _available_structures(wanted, dataset, cases)
    known = set().union(*available.values())
    if dataset is not None and not any(map(is_map_without_table, [*wanted.values(), *predicted.values()])):
        logger.warning("the names of %r are not used: no file is a label map without a table of its own", dataset)
    chosen = known if structures is None else _table_names(structures, known)
    if chosen - known:
        raise InputError(
            f"no case has a reference of {', '.join(sorted(chosen - known))}",
            where=str(reference),
            hint="there are: " + ", ".join(sorted(known)) if known else "mome list labels",
        )
    if cases is not None and Path(reference).is_dir():
        _check_references(cases, set(wanted), chosen, partial=on_missing is not None)
    _say_what_is_not_scored(predicted, wanted, prediction, reference)
    to_score = [(case, sorted(names & chosen)) for case, names in available.items() if names & chosen]
    scores = []
    unscored: Counter[str] = Counter()
    sheared: dict[str, None] = {}  # cases, each once, in order
    for case, names in progress(to_score):
        if case not in predicted:
            if on_missing is None:
                raise InputError(f"case {case!r} has no prediction", where=str(prediction), hint=_HINT_PARTIAL)
            on_missing(case, None)
            continue
        references, predictions = open_masks(wanted[case], dataset), open_masks(predicted[case], dataset)
        for files, whose in ((wanted[case], "reference"), (predicted[case], "prediction")):
            if twice := [name for name in masked_and_mapped(files, dataset) if name in names]:
                what = f"the {whose} has both a mask and a label map of {', '.join(twice)[:200]}"
                logger.warning("case %r: %s: the mask is scored", case, what)
        if structures is None:
            unscored.update(_without_reference(predicted[case], predictions, available[case]))
        for structure in names:
            if structure not in references:
                raise InputError(
                    f"case {case!r} has no reference of {structure!r}",
                    where=str(reference),
                    hint="is the dataset name right?",
                )
            if structure in predictions:
                wanted_mask = references[structure]()
                if wanted_mask.grid.shear > SMALLEST_SHEAR:
                    sheared.setdefault(case)
                if cases is not None and not wanted_mask.array.any():
                    logger.warning("case %r: %r is annotated, and its reference has no voxel", case, structure)
                scores.append(_score(case, structure, predictions[structure](), wanted_mask, tolerance))
            elif on_missing is not None:
                on_missing(case, structure)
            else:
                raise InputError(
                    f"case {case!r} has no prediction of {structure!r}",
                    hint=f"segment it with -p {structure}; {_HINT_PARTIAL}",
                )
    if sheared:
        shown = ", ".join([*list(sheared)[:5], "…"][: len(sheared)])
        logger.warning(
            "the axes of %d cases are not at right angles (gantry tilt?), and surface Dice and HD95 are computed as if "
            "they were: %s",
            len(sheared),
            shown,
        )
    if unscored:
        shown = ", ".join(f"{name} ({count})" for name, count in sorted(unscored.items())[:20])
        more = ", …" if len(unscored) > 20 else ""
        logger.warning("predicted structures without a reference are not scored (cases): %s%s", shown, more)
    if not scores:
        what = "the list of cases names no structure" if not known else "nothing of the reference was predicted"
        raise InputError(f"there is nothing to score: {what}", where=str(prediction if known else cases or reference))
    return scores


def _check_references(cases: str | Path, found: set[str], chosen: set[str], *, partial: bool) -> None:
    """Checks that the listed cases have references: a folder that was copied in part would give a mean of the rest.

    Raises:
        InputError: Some have none, and `partial` is False.
    """
    found = {unicodedata.normalize("NFC", case) for case in found}
    listed = {unicodedata.normalize("NFC", case): names for case, names in read_case_list(cases).items()}
    without = [case for case, names in listed.items() if set(names) & chosen and case not in found]
    if not without:
        return
    shown = ", ".join(without[:5]) + (", …" if len(without) > 5 else "")
    what = f"{len(without)} listed cases have no reference: {shown}"
    if not partial:
        raise InputError(what, where=str(cases), hint="--partial scores the others")
    logger.warning("%s", what)


def _without_reference(files: Files, predictions: dict[str, Callable[[], Volume]], annotated: set[str]) -> list[str]:
    """Returns the predicted structures of a case that its reference does not have.

    The table of a label map may name structures of which the map has no voxel; they are not predicted.
    """
    others = sorted(set(predictions) - annotated)
    return [name for name in others if name in files or predictions[name]().array.any()]


def _say_what_is_not_scored(
    predicted: dict[str, Files], wanted: dict[str, Files], prediction: str | Path, reference: str | Path
) -> None:
    """Warns where a set of files is compared with itself, and of predicted cases without a reference."""
    if Path(prediction).resolve() == Path(reference).resolve():
        logger.warning("prediction and reference are the same files: %s", prediction)
    others = sorted(set(predicted) - set(wanted))
    if others:
        shown = ", ".join(others[:5]) + (", …" if len(others) > 5 else "")
        logger.warning("%d predicted cases have no reference and are not scored: %s", len(others), shown)


def _available_structures(
    wanted: dict[str, Files], dataset: str | None, cases: str | Path | None
) -> dict[str, set[str]]:
    """For every case, the structures that its reference annotates: those listed in `cases`, else those of its files.

    Raises:
        InputError: A case of the reference is not in the list, or its label map has no names.
    """
    annotated = None if cases is None else read_case_list(cases)
    if annotated is not None:  # names of files and of the list may have accents in another form
        annotated = {unicodedata.normalize("NFC", case): names for case, names in annotated.items()}
    available = {}
    for case, files in wanted.items():
        listed = unicodedata.normalize("NFC", case)
        if annotated is not None and listed not in annotated:
            raise InputError(f"case {case!r} is not in the list of cases", where=str(cases))
        available[case] = set(open_masks(files, dataset) if annotated is None else annotated[listed])
    return available


def _table_names(structures: str | Sequence[str], known: Iterable[str]) -> set[str]:
    """The labels that names, synonyms and pairs stand for in the class table; other texts stay as they are.

    Args:
        structures: Texts.
        known: Structures of the references, some of which the class table may not have.
    """
    names, others = set[str](), list(known)
    for text in [structures] if isinstance(structures, str) else structures:
        own = own_label(text, others) if text.strip() else None
        names.update((own,) if own else load_table().names_of(text) or (text,))
    return names


def _score(case: str, structure: str, prediction: Volume, reference: Volume, tolerance: float) -> Score:
    """Scores one pair of masks.

    Raises:
        InputError: They are on different grids.
    """
    difference = prediction.grid.difference(reference.grid)
    if not prediction.grid.same_as(reference.grid, tolerance=0.01):  # other programs turn axes: as LAS, a scan of LPS
        prediction = reordered(prediction, reference.grid)
    if not prediction.grid.same_as(reference.grid, tolerance=0.01):
        raise InputError(
            f"prediction and reference of {structure!r} in {case!r} are on different grids: {difference}",
            hint="mome segment keeps the scan's grid; was the reference resampled?",
        )
    p, r, spacing = prediction.array, reference.array, reference.spacing
    for mask, whose in ((p, "prediction"), (r, "reference")):
        share = float(mask.mean())
        if share > _LARGEST_SHARE:
            what = f"the {whose} of {structure!r} fills {share:.0%} of the image"
            logger.warning("case %r: %s: is it inverted?", case, what)
    if p.any() and not r.any():
        logger.warning(
            "case %r: the reference of %r has no voxel, so both Dice are 0, and HD95 is the image's diagonal",
            case,
            structure,
        )
    if p.any() and r.any():  # not cropped if one is empty, because HD95 is then the diagonal of the whole image
        box = bounding_box(p | r)
        p, r = p[box], r[box]
    surface_dice = normalized_surface_dice(p, r, spacing, tolerance)
    return Score(case, structure, dice(p, r), surface_dice, hausdorff95(p, r, spacing))


def summarise(scores: list[Score], *, seed: int = 0, resamples: int = 2000) -> list[dict[str, Any]]:
    """Statistics of every structure: number of cases, and mean, median and 95 % interval of every metric.

    Args:
        scores: Scores of cases; NaN (both masks empty) is left out.
        seed: Seed of the bootstrap.
        resamples: Resamples of the bootstrap, which gives the interval of the mean.

    Returns:
        A row per structure, sorted by name, with `structure`, `n`, and for `dice`, `nsd` and `hd95` a dict of `n`,
        `mean`, `median`, `low` and `high`. A last row `mean` averages the means of the structures.
    """
    rows = []
    for structure in sorted({score.structure for score in scores}):
        chosen = [score for score in scores if score.structure == structure]
        row: dict[str, Any] = {"structure": structure, "n": len(chosen)}
        for metric in ("dice", "nsd", "hd95"):
            values = np.array([getattr(score, metric) for score in chosen], dtype=float)
            row[metric] = _statistics(values[~np.isnan(values)], seed, resamples)
        rows.append(row)
    if rows:
        overall: dict[str, Any] = {"structure": "mean", "n": len(scores)}
        for metric in ("dice", "nsd", "hd95"):
            means = [row[metric]["mean"] for row in rows if not math.isnan(row[metric]["mean"])]
            overall[metric] = {"mean": float(np.mean(means)) if means else float("nan"), "n": len(means)}
        rows.append(overall)
    return rows


def _statistics(values: np.ndarray, seed: int, resamples: int) -> dict[str, float]:
    """Mean, median and percentile bootstrap interval of the mean; NaN without values."""
    if not len(values):
        nan = float("nan")
        return {"n": 0, "mean": nan, "median": nan, "low": nan, "high": nan}
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        "n": len(values),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "low": float(low),
        "high": float(high),
    }
