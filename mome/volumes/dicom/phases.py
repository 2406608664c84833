"""Several images at one place: copies, phases of the heart, time points, reconstructions. One of them is chosen."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mome.errors import InputError
from mome.volumes.dicom.geometry import Layout
from mome.volumes.dicom.slices import Slice
from mome.volumes.stored import check_only_frame

# Attributes that have one value in each phase.
_NAMING = (
    "TemporalPositionIdentifier",
    "NominalPercentageOfCardiacPhase",
    "AcquisitionNumber",
    "ImageType",
    "KVP",
    "SliceThickness",
    "SeriesNumber",
)
# Attributes that differ from slice to slice, but rise from one phase to the next.
_RISING = ("TriggerTime", "AcquisitionTime", "ContentTime", "InstanceNumber", "frame")
# Two slices that are nearer than this part of their distance to others are a pair (our choice).
_TOO_NEAR = 0.25
_FEWEST_OF_A_PASS = 3
_MOST_NAMED = 6


@dataclass(frozen=True)
class Phases:
    """Images of a series that has as many at every place.

    Attributes:
        attribute: The attribute by which they differ.
        names: The name of every phase; empty for times, which say nothing to the user.
        indices: For every phase, the index of its slice at every place.
    """

    attribute: str
    names: list[str]
    indices: list[list[int]]


def one_per_place(
    layout: Layout, slices: Sequence[Slice], array: np.ndarray, frame: int | None, path: Path, notes: list[str]
) -> list[int]:
    """Returns the index of one slice for every place: the only one, the first of copies, or that of a phase.

    Args:
        layout: Where the slices lie.
        slices: The slices.
        array: (slices, rows, columns), HU.
        frame: The phase, from 0, where there are several.
        path: The folder, for errors.
        notes: Notes so far; others are added.

    Raises:
        InputError: Images at one place differ, and no phase is chosen or the headers do not tell phases apart.
    """
    places = layout.places
    if all(len(place) == 1 for place in places):
        check_only_frame(frame, path)
        return [place[0] for place in places]
    different = [place for place in places if any(not np.array_equal(array[place[0]], array[k]) for k in place[1:])]
    if not different:
        check_only_frame(frame, path)
        dropped = sum(len(place) - 1 for place in places)
        are = "duplicate slice, with the same place and the same pixels as another, is"
        if dropped > 1:
            are = "duplicate slices, with the same place and the same pixels as others, are"
        notes.append(f"{dropped} {are} left out")
        return [place[0] for place in places]
    if len(places) == 1:
        raise InputError(
            f"all {len(places[0])} slices state the same place, and their images differ",
            where=str(path),
            hint="ImagePositionPatient is wrong, or this is no volume: export the series again",
        )
    if len({len(place) for place in places}) > 1:
        places = [_without_copies(place, array) for place in places]
    counts = {len(place) for place in places}
    phases = phases_of(places, slices) if len(counts) == 1 else None
    what = f"{len(different)} of {len(places)} places have several different images: "
    if phases is None:
        told_apart = (
            f"there are {min(counts)} at each, and no attribute in the headers tells them apart"
            if len(counts) == 1
            else "there are several acquisitions"
        )
        raise InputError(
            what + told_apart, where=str(path), hint="put each acquisition into a folder of its own, or export one"
        )
    names = f": {', '.join(phases.names[:_MOST_NAMED])}" if phases.names else ""
    if frame is None or not 0 <= frame < len(phases.indices):
        raise InputError(
            f"{what}there are {len(phases.indices)} time points or reconstructions, which differ in "
            f"{phases.attribute}{names}",
            where=str(path),
            hint=f"choose one from 0 to {len(phases.indices) - 1}: mome segment --frame 0, in Python frame=0",
        )
    which = f" ({phases.attribute} {phases.names[frame]})" if phases.names else f", in order of {phases.attribute}"
    notes.append(f"the series has {len(phases.indices)} images at every place; time point {frame} is read{which}")
    return phases.indices[frame]


def phases_of(places: Sequence[Sequence[int]], slices: Sequence[Slice]) -> Phases | None:
    """Returns the phases of a series with equally many images at every place, or None where no attribute tells them.

    An attribute tells phases apart where its values are the same at every place, as of AcquisitionNumber, or where all
    values of a phase are smaller than those of the next one, as of times. The order of instance numbers at each place
    alone says nothing: it may differ from place to place.
    """
    for name in _NAMING:
        by_place = [{slices[k].attributes[name]: k for k in place} for place in places]
        first = by_place[0]
        if (
            None not in first
            and len(first) == len(places[0])
            and all(values.keys() == first.keys() for values in by_place)
        ):
            values = sorted(first)
            return Phases(name, [_text(value) for value in values], [[at[v] for at in by_place] for v in values])
    for name in _RISING:
        if any(slices[k].attributes[name] is None for place in places for k in place):
            continue
        ordered = [sorted(place, key=lambda k: slices[k].attributes[name]) for place in places]
        indices = [list(phase) for phase in zip(*ordered, strict=True)]
        spans = [[slices[k].attributes[name] for k in phase] for phase in indices]
        if all(max(one) < min(other) for one, other in zip(spans, spans[1:], strict=False)):
            numbered = name in ("InstanceNumber", "frame")
            return Phases(name, [f"{min(s):g}–{max(s):g}" for s in spans] if numbered else [], indices)
    return None


def check_one_acquisition(slices: Sequence[Slice], layout: Layout, path: Path) -> list[str]:
    """Checks that slices, in order along their line, are not taken in turn from two acquisitions at other places.

    Args:
        slices: One slice for every place of `layout`.
        layout: Where the slices lie.
        path: The folder, for errors.

    Returns:
        Notes where instance numbers pass over the same places several times, and where slices of another acquisition
        lie between those of one.

    Raises:
        InputError: Slices of two acquisitions, phases or kinds take turns, or slices lie at almost one place.
    """
    notes = []
    for name in _NAMING:
        values = [image.attributes[name] for image in slices]
        runs = Counter(value for value, _ in itertools.groupby(values))
        named = ", ".join(_text(value) for value in list(runs)[:_MOST_NAMED])
        if max(runs.values()) > 1:
            notes.append(f"slices that differ in {name} lie between the others: {named}")
        if sum(count > 1 for count in runs.values()) > 1:
            raise InputError(
                f"slices of several acquisitions or phases take turns: {name} is {named}",
                where=str(path),
                hint="put each acquisition into a folder of its own",
            )
    steps = np.diff(layout.distances)
    if layout.step is None and _pairs(steps) > 1:
        raise InputError(
            f"slices lie {steps.min():.3g} mm apart where others are {steps.max():.3g} mm apart: these are images of "
            "two acquisitions, or ImagePositionPatient is wrong",
            where=str(path),
            hint="put each acquisition into a folder of its own",
        )
    passes = _passes([image.attributes["InstanceNumber"] for image in slices])
    if passes > 1:
        notes.append(
            f"by their instance numbers the slices pass {passes} times over the same places: these may be several "
            "acquisitions in one volume"
        )
    return notes


def _pairs(steps: np.ndarray) -> int:
    """Counts the pairs of slices that lie close together, and far from the slices around them."""
    around = np.concatenate([[np.inf], steps, [np.inf]])
    return int((steps < _TOO_NEAR * np.minimum(around[:-2], around[2:])).sum()) if len(steps) > 1 else 0


def _passes(numbers: list[float | None]) -> int:
    """Returns how many times slices run along their line in order of their instance numbers, 1 where it is unclear."""
    given = [number for number in numbers if number is not None]
    if len(given) < len(numbers) or len(set(given)) < len(given):
        return 1
    order = np.argsort(np.asarray(given))
    best = 1
    for places in (order, order[::-1]):
        runs = np.split(places, np.flatnonzero(np.diff(places) < 0) + 1)
        if 1 < len(runs) <= len(places) // _FEWEST_OF_A_PASS and all(
            len(run) >= _FEWEST_OF_A_PASS and run[0] < other[-1] and other[0] < run[-1]
            for run, other in zip(runs, runs[1:], strict=False)
        ):
            best = len(runs)
    return best


def _without_copies(place: Sequence[int], array: np.ndarray) -> list[int]:
    kept: list[int] = []
    for k in place:
        if not any(np.array_equal(array[k], array[other]) for other in kept):
            kept.append(k)
    return kept


def _text(value: Any) -> str:
    if value is None:
        return "not given"
    return "\\".join(value) if isinstance(value, tuple) else f"{value:g}"
