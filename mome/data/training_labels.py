"""Checks of a scan and its label map before they are cached for training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mome.errors import InputError


def check_labels(
    labels: np.ndarray, annotated: Mapping[str, int], dataset: Mapping[str, int], case: str, where: Path
) -> list[str]:
    """Compares a label map with what is annotated in its case.

    Args:
        labels: Integers (i, j, k).
        annotated: Structure → number, of the structures annotated in this case.
        dataset: Structure → number, of all structures of the data set.
        case: The case's name.
        where: The file, named in errors.

    Returns:
        Notes on values that the data set does not name, and on annotated structures without a voxel.

    Raises:
        InputError: Structures are annotated, and none of them has a voxel.
    """
    present = set(np.unique(labels).tolist()) - {0}
    unknown = sorted(present - set(dataset.values()))
    empty = [name for name, number in annotated.items() if number not in present]
    if annotated and len(empty) == len(annotated):
        raise InputError(
            f"no structure annotated in case {case!r} has a voxel: the label map holds {_shown(sorted(present))}",
            where=str(where),
            hint="numbers: " + ", ".join(f"{name} {number}" for name, number in list(annotated.items())[:4]),
        )
    notes = []
    if unknown:
        notes.append(f"case {case!r}: the data set does not name the label values {_shown(unknown)}")
    if empty:
        notes.append(f"case {case!r}: annotated, but without a voxel: {', '.join(empty)}")
    return notes


def check_image(hu: np.ndarray, case: str, where: Path) -> None:
    """Checks that a scan shows something.

    Raises:
        InputError: All voxels have one value, as where all were NaN.
    """
    if hu.min() == hu.max():
        raise InputError(
            f"all voxels of case {case!r} have one value, {float(hu.flat[0]):g} HU (NaN is read as air)",
            where=str(where),
            hint="convert the scan again, or remove the case from cases.json",
        )


def _shown(numbers: list[int]) -> str:
    if not numbers:
        return "only 0"
    return ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
