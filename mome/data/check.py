"""Says what is wrong with a folder of training cases before anything is trained on it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mome.data.case import Case
from mome.data.masks_in_air import masks_in_air
from mome.data.training_labels import check_image
from mome.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or doubtful.

    Attributes:
        case: The case's name.
        is_error: Whether the case cannot be trained on; False for a doubt.
        what: One sentence.
        where: The file.
        hint: What to do about it, or empty.
    """

    case: str
    is_error: bool
    what: str
    where: str = ""
    hint: str = ""


def check_cases(
    cases: Sequence[Case],
    other_splits: Mapping[str, Sequence[Case]] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items,
) -> list[Finding]:
    """Reads every case and returns what is wrong with it.

    Found are: files that cannot be read, a label map on another grid, values that the data set does not name, values
    that are no whole numbers, annotated structures without a voxel, masks of solid structures that lie in air, HU that
    is not HU, sides that cannot be told apart, the same scan twice, and a patient in two splits.

    Args:
        cases: The cases.
        other_splits: Name of a split → its cases, which must share no patient and no scan with `cases`. Splits that
            the cases themselves name are compared, too.
        progress: Wraps the iteration over cases, for a progress bar.

    Returns:
        The findings, in the order of the cases; those across cases last.
    """
    findings: list[Finding] = []
    for case in progress(list(cases)):
        findings += _check_case(case)
    return [*findings, *_repeated_scans(cases), *_shared(cases, other_splits or {})]


def check_named(names: Sequence[str], cases: Sequence[Case], folder: Path) -> None:
    """Checks that a case annotates every structure that was asked for, before scans are read.

    Raises:
        InputError: None does.
    """
    known = list(dict.fromkeys(name for case in cases for name in case.annotated))
    for name in names:
        if name not in known:
            raise InputError(
                f"no case annotates {name!r:.60}{did_you_mean(name[:60], known)}",
                where=str(folder),
                hint="annotated are: " + ", ".join(known[:20]),
            )


def _check_case(case: Case) -> list[Finding]:
    try:
        volume = case.read_image()
        check_image(volume.array, case.name, case.image)
        masks, notes = case.read_masks(volume.grid)
    except InputError as error:
        where = error.where or str(case.image)
        return [Finding(case.name, True, error.what, where, error.hint or "")]
    notes = [*notes, *masks_in_air(volume.array, masks)]
    doubts = [Finding(case.name, False, note, str(case.image)) for note in volume.notes]
    prefix = f"case {case.name!r}: "
    return doubts + [
        Finding(case.name, False, note.removeprefix(prefix), str(case.labels or case.image)) for note in notes
    ]


def _repeated_scans(cases: Sequence[Case]) -> list[Finding]:
    """Finds scans with equal bytes under two names."""
    by_size: dict[int, list[Case]] = defaultdict(list)
    for case in cases:
        if case.image.is_file():
            by_size[case.image.stat().st_size].append(case)
    findings = []
    for group in by_size.values():
        first: dict[str, Case] = {}
        for case in group if len(group) > 1 else ():
            other = first.setdefault(_digest(case.image), case)
            if other is not case:
                what = f"the scan is the same as that of case {other.name!r}"
                findings.append(Finding(case.name, False, what, str(case.image), "keep one of them"))
    return findings


def _shared(cases: Sequence[Case], other_splits: Mapping[str, Sequence[Case]]) -> list[Finding]:
    """Finds patients, and scans with equal bytes, that lie in two splits."""
    splits: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        splits[case.split or "these cases"].append(case)
    for name, others in other_splits.items():
        splits[name].extend(others)
    findings, patients, scans = [], dict[str, str](), dict[str, str]()
    for split, members in splits.items():
        for case in members:
            if patients.setdefault(case.patient, split) != split:
                what = f"patient {case.patient!r} is in {patients[case.patient]} and in {split}"
                findings.append(Finding(case.name, True, what, str(case.image), "move the patient's cases together"))
            elif len(splits) > 1 and case.image.is_file():
                digest = _digest(case.image)
                if scans.setdefault(digest, split) != split:
                    what = f"the scan is in {scans[digest]} and in {split}"
                    findings.append(Finding(case.name, True, what, str(case.image), "keep it in one of them"))
    return findings


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
