"""Evaluation of folders of masks: per case and structure, then per structure with confidence intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mome.errors import InputError
from mome.labels import load_table
from mome.metrics.files import find_masks, open_masks, pair_files
from mome.metrics.overlap import dice
from mome.metrics.surface import bounding_box, hausdorff95, normalized_surface_dice
from mome.volumes import Volume

_PARTIAL = "evaluate -p NAME scores a structure alone, --partial what was predicted"


@dataclass(frozen=True)
class Score:
    """One structure of one case. NaN where both masks are empty."""

    case: str
    structure: str
    dice: float
    nsd: float
    hd95: float


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

    A folder (or single file) holds, per case, either `<case>_<structure>.nii.gz` masks or one `<case>.nii.gz` map
    of numbers. The numbers of a map are read from the table in its header where it has one, else from `dataset`.
    Two single files are compared whatever they are called. Masks are read one structure at a time.

    Args:
        prediction, reference: Folders or files.
        dataset: Name of the label YAML for maps without a table, as in "openkbp".
        cases: A `cases.json` whose `annotated` lists say what is annotated in each case; the rest is left out.
        structures: Score these only, by name or synonym.
        on_missing: Called with a case (and structure) of the reference that has no prediction, which is then left
            out. Where None, that is an error: a mean over what happened to be predicted says little.
        tolerance: Of the surface Dice, in mm.
        progress: Wraps the iteration over cases.

    Raises:
        InputError: A missing file, a case or structure without a prediction, nothing to score, masks on different
            grids.
    """
    if Path(prediction).is_file() and Path(reference).is_file():
        predicted, wanted = pair_files(prediction, reference, dataset=dataset)
    else:
        wanted = find_masks(reference, dataset=dataset)
        predicted = find_masks(prediction, dataset=dataset, cases=list(wanted))
    annotated = _annotated(cases)
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
    chosen = None if structures is None else _names(structures)
    there: dict[str, set[str]] = {}
    for case, files in wanted.items():
        if annotated is not None and case not in annotated:
            raise InputError(f"case {case!r} is not in the list of cases", where=str(cases))
        there[case] = set(open_masks(files, dataset) if annotated is None else annotated[case])
    known = set().union(*there.values())
    unknown = sorted(set() if chosen is None else chosen - known)
    if unknown:
        raise InputError(
            f"no case has a reference of {', '.join(unknown)}",
            where=str(reference),
            hint="there are: " + ", ".join(sorted(known)) if known else "mome list labels",
        )
    asked = {case: sorted(names if chosen is None else names & chosen) for case, names in there.items()}
    scores = []
    for case, names in progress([(case, names) for case, names in asked.items() if names]):
        if case not in predicted:
            if on_missing is None:
                raise InputError(f"case {case!r} has no prediction", where=str(prediction), hint=_PARTIAL)
            on_missing(case, None)
            continue
        truth, guess = open_masks(wanted[case], dataset), open_masks(predicted[case], dataset)
        for structure in names:
            if structure not in truth:
                raise InputError(
                    f"case {case!r} has no reference of {structure!r}",
                    where=str(reference),
                    hint="is the dataset name right?",
                )
            if structure not in guess and on_missing is not None:
                on_missing(case, structure)
            else:
                scores.append(_score(case, structure, guess, truth, tolerance))
    if not scores:
        what = "the list of cases names no structure" if not known else "nothing of the reference was predicted"
        raise InputError(f"there is nothing to score: {what}", where=str(prediction if known else cases or reference))
    return scores


def _names(structures: str | Sequence[str]) -> set[str]:
    """Names of the class table, of names and exact synonyms; others stay as they are."""
    names = set()
    for text in [structures] if isinstance(structures, str) else structures:
        resolved = load_table().resolve(text)
        names.add(resolved.name if resolved.name and resolved.how in ("exact", "synonym") else text)
    return names


def _score(
    case: str,
    structure: str,
    guess: dict[str, Callable[[], Volume]],
    truth: dict[str, Callable[[], Volume]],
    tolerance: float,
) -> Score:
    if structure not in guess:
        raise InputError(
            f"case {case!r} has no prediction of {structure!r}", hint=f"segment it with -p {structure}; {_PARTIAL}"
        )
    p, r = guess[structure](), truth[structure]()
    if not p.grid.same_as(r.grid, tolerance=0.01):
        raise InputError(
            f"prediction and reference of {structure!r} in {case!r} are on different grids: "
            f"{p.shape} at {_mm(p)} and {r.shape} at {_mm(r)}",
            hint="mome segment keeps the scan's grid; was the reference resampled?",
        )
    a, b = p.array, r.array
    if a.any() and b.any():  # where one is empty, HD95 is the diagonal of the whole image
        box = bounding_box(a | b)
        a, b = a[box], b[box]
    return Score(
        case,
        structure,
        dice(a, b),
        normalized_surface_dice(a, b, r.spacing, tolerance),
        hausdorff95(a, b, r.spacing),
    )


def _mm(volume: Volume) -> str:
    return "×".join(f"{s:.3g}" for s in volume.spacing) + " mm"


def _annotated(cases: str | Path | None) -> dict[str, list[str]] | None:
    if cases is None:
        return None
    path = Path(cases)
    if not path.is_file():
        raise InputError("no such list of cases", where=str(path))
    try:
        return {name: list(entry["annotated"]) for name, entry in json.loads(path.read_text()).items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError("the list of cases is not {case: {annotated: [...]}}", where=str(path)) from error


def summarise(scores: list[Score], *, seed: int = 0, resamples: int = 2000) -> list[dict[str, Any]]:
    """Per structure: cases counted, and mean, median and bootstrap 95 % interval of the mean for every metric.

    NaN (both masks empty) is left out. The last row, `mean`, averages the structures' means.
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
