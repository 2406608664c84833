"""Evaluation of folders of masks: per case and structure, then per structure with confidence intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mome.errors import InputError
from mome.labels import load_dataset, load_table
from mome.metrics.overlap import dice
from mome.metrics.surface import hausdorff95, normalized_surface_dice
from mome.volumes import Volume, read_label_table, read_volume
from mome.volumes.read import stem


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
    tolerance: float = 2.0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> list[Score]:
    """Scores every structure of every case of the reference.

    A folder (or single file) holds, per case, either `<case>_<structure>.nii.gz` masks or one `<case>.nii.gz` map
    of numbers. The numbers of a map are read from the table in its header where it has one, else from `dataset`.

    Args:
        prediction, reference: Folders or files.
        dataset: Name of the label YAML for maps without a table, as in "openkbp".
        cases: A `cases.json` whose `annotated` lists say what is annotated in each case; the rest is left out.
        tolerance: Of the surface Dice, in mm.
        progress: Wraps the iteration over cases.

    Raises:
        InputError: A missing file, a case or structure without a prediction, masks on different grids.
    """
    names = load_table().names()
    wanted = _index(reference, names)
    predicted = _index(prediction, names, cases=list(wanted))
    annotated = _annotated(cases)
    if not wanted:
        raise InputError(
            "no masks to compare with",
            where=str(reference),
            hint="<case>.nii.gz or <case>_<structure>.nii.gz",
        )
    scores = []
    for case, files in progress(list(wanted.items())):
        if case not in predicted:
            raise InputError(f"case {case!r} has no prediction", where=str(prediction))
        truth = _masks(files, dataset)
        listed = annotated.get(case) if annotated is not None else None
        if annotated is not None and listed is None:
            raise InputError(f"case {case!r} is not in the list of cases", where=str(cases))
        guess = _masks(predicted[case], dataset)
        for structure in sorted(set(truth) if listed is None else set(listed)):
            scores.append(_score(case, structure, guess, truth, tolerance))
    return scores


def _score(case: str, structure: str, guess: dict[str, Volume], truth: dict[str, Volume], tolerance: float) -> Score:
    if structure not in guess:
        raise InputError(f"case {case!r} has no prediction of {structure!r}", hint=f"segment it with -p {structure}")
    if structure not in truth:
        raise InputError(f"case {case!r} has no reference of {structure!r}", hint="is the dataset name right?")
    p, r = guess[structure], truth[structure]
    if not p.grid.same_as(r.grid, tolerance=0.01):
        raise InputError(
            f"prediction and reference of {structure!r} in {case!r} are on different grids: "
            f"{p.shape} at {_mm(p)} and {r.shape} at {_mm(r)}",
            hint="mome segment keeps the scan's grid; was the reference resampled?",
        )
    a, b = p.array > 0, r.array > 0
    return Score(
        case,
        structure,
        dice(a, b),
        normalized_surface_dice(a, b, r.spacing, tolerance),
        hausdorff95(a, b, r.spacing),
    )


def _mm(volume: Volume) -> str:
    return "×".join(f"{s:.3g}" for s in volume.spacing) + " mm"


def _index(place: str | Path, names: list[str], cases: list[str] | None = None) -> dict[str, dict[str | None, Path]]:
    """Case → {structure or None for a map: file}. Known `cases` also part names from free-text structures."""
    place = Path(place)
    if not place.exists():
        raise InputError("no such file or folder", where=str(place))
    files = [place] if place.is_file() else sorted(place.glob("*.nii.gz")) + sorted(place.glob("*.nii"))
    by_length = sorted(names, key=len, reverse=True)
    found: dict[str, dict[str | None, Path]] = {}
    for file in files:
        base = stem(file)
        structure = next((name for name in by_length if base.endswith(f"_{name}")), None)
        case = base[: -len(structure) - 1] if structure else base
        owner = max((c for c in cases or [] if base.startswith(f"{c}_")), key=len, default=None)
        if owner is not None and case != owner:
            case, structure = owner, base[len(owner) + 1 :]
        found.setdefault(case, {})[structure] = file
    return found


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


def _masks(files: dict[str | None, Path], dataset: str | None) -> dict[str, Volume]:
    """Structure → 0/1 volume."""
    masks = {name: read_volume(path) for name, path in files.items() if name is not None}
    if None in files:
        volume = read_volume(files[None])
        table = {entry["name"]: int(entry["id"]) for entry in read_label_table(files[None])}
        if not table and dataset is not None:
            table = load_dataset(dataset).name_to_id
        if not table:
            raise InputError(
                "the file's numbers have no names: it holds no label table",
                where=str(files[None]),
                hint="say whose numbers they are, as in --labels openkbp",
            )
        for name, number in table.items():
            masks.setdefault(name, Volume(volume.array == number, volume.affine, volume.header))
    return masks


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
