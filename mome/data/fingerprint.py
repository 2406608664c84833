"""What the cases of a data set look like: sizes, voxel sizes, HU and volumes of the annotated structures.

The idea of planning from such a fingerprint is nnU-Net's (Isensee et al., Nature Methods 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mome.data.case import WITHOUT_VOXEL, Case
from mome.data.training_labels import check_image
from mome.errors import InputError
from mome.volumes.orientation import closest_axes

# HU of a case are sampled, so that a fingerprint needs little memory. Our choice.
_SAMPLES = 5000


@dataclass(frozen=True)
class CaseFingerprint:
    """One case.

    Attributes:
        name: The case's name.
        spacing: Voxel size (x, y, z) in mm, along left-right, front-back and head-foot.
        extent: Size of the scan along the same directions in mm.
        volumes_ml: Annotated structure → its volume.
        hu: HU of a sample of the voxels inside annotated structures.
        notes: Sentences for the user, as about label values that the data set does not name.
    """

    name: str
    spacing: tuple[float, float, float]
    extent: tuple[float, float, float]
    volumes_ml: dict[str, float]
    hu: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fingerprint:
    """All cases of a data set.

    Attributes:
        cases: One entry per case that can be used.
        problems: Case that cannot be used → the reason.
    """

    cases: tuple[CaseFingerprint, ...]
    problems: dict[str, str] = field(default_factory=dict)

    def of(self, names: Collection[str]) -> Fingerprint:
        """Returns the fingerprint of some of the cases.

        Raises:
            InputError: None of them can be used.
        """
        kept = tuple(case for case in self.cases if case.name in names)
        if not kept:
            raise InputError("no training case can be used", hint="mome data check FOLDER")
        return Fingerprint(kept, {name: reason for name, reason in self.problems.items() if name in names})

    @property
    def structures(self) -> list[str]:
        """The structures that a case annotates with at least one voxel, in the order in which they first occur."""
        found = (name for case in self.cases for name, volume in case.volumes_ml.items() if volume > 0)
        return list(dict.fromkeys(found))

    @property
    def without_voxels(self) -> list[str]:
        """The structures that cases annotate, and that have no voxel in any of them."""
        annotated = (name for case in self.cases for name in case.volumes_ml)
        return [name for name in dict.fromkeys(annotated) if name not in self.structures]

    def median_spacing(self) -> tuple[float, ...]:
        """Returns the median voxel size (x, y, z) in mm."""
        return tuple(float(v) for v in np.median([case.spacing for case in self.cases], axis=0))

    def median_extent(self) -> tuple[float, ...]:
        """Returns the median size of a scan (x, y, z) in mm."""
        return tuple(float(v) for v in np.median([case.extent for case in self.cases], axis=0))

    def hu_range(self, low: float = 0.5, high: float = 99.5) -> tuple[float, float]:
        """Returns two percentiles of the HU inside annotated structures, of up to 5,000 voxels of every case.

        Raises:
            InputError: No case has a voxel of a structure.
        """
        values = [value for case in self.cases for value in case.hu]
        if not values:
            raise InputError("no case has a voxel of an annotated structure", hint="mome data check FOLDER")
        return float(np.percentile(values, low)), float(np.percentile(values, high))

    def summary(self) -> dict[str, Any]:
        """Returns the fingerprint as JSON values, without the samples of HU."""
        cases = [{key: value for key, value in asdict(case).items() if key != "hu"} for case in self.cases]
        return {"cases": cases, "problems": self.problems, "without_voxels": self.without_voxels}


def fingerprint(
    cases: Sequence[Case], progress: Callable[[Iterable[Any]], Iterable[Any]] = lambda items: items
) -> Fingerprint:
    """Reads every case once.

    Args:
        cases: The cases.
        progress: Wraps the iteration over cases, for a progress bar.

    Raises:
        InputError: No case can be used.
    """
    found, problems = [], {}
    for number, case in enumerate(progress(list(cases))):
        try:
            found.append(_of_case(case, np.random.default_rng(number)))
        except InputError as error:
            problems[case.name] = str(error)
    if not found:
        name, reason = next(iter(problems.items()))
        raise InputError(f"no case can be used; {name!r:.60}: {reason.splitlines()[0]}", hint="mome data check FOLDER")
    return Fingerprint(tuple(found), problems)


def _of_case(case: Case, rng: np.random.Generator) -> CaseFingerprint:
    """Returns the fingerprint of one case.

    Raises:
        InputError: It cannot be used.
    """
    volume = case.read_image()
    check_image(volume.array, case.name, case.image)
    masks, notes = case.read_masks(volume.grid)
    notes = [note for note in notes if WITHOUT_VOXEL not in note]  # the volumes say that
    voxel_ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
    inside = np.zeros(volume.grid.shape, dtype=bool)
    for mask in masks.values():
        inside |= mask
    hu = volume.array[inside]
    hu = rng.choice(hu, min(_SAMPLES, hu.size), replace=False) if hu.size else hu
    worlds = [world for world, _ in closest_axes(volume.affine)]
    spacing, extent = [0.0] * 3, [0.0] * 3
    for axis, world in enumerate(worlds):
        spacing[world] = round(volume.grid.spacing[axis], 4)
        extent[world] = round(volume.grid.spacing[axis] * volume.grid.shape[axis], 2)
    volumes = {name: round(float(mask.sum()) * voxel_ml, 3) for name, mask in masks.items()}
    return CaseFingerprint(case.name, tuple(spacing), tuple(extent), volumes, tuple(hu.tolist()), tuple(notes))  # type: ignore[arg-type]
