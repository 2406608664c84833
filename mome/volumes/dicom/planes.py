"""Irregular stacks on a regular grid: planes of equal steps, interpolated from where the slices are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mome.errors import InputError
from mome.volumes.dicom.geometry import Layout
from mome.volumes.sizes import MOST_VOXELS

AIR = -1024.0
# A gap of up to this many mm, or of a little more than twice the typical step, is interpolated (our choice): one
# missing slice, or one change of the step. A larger gap could hide a structure.
_SMALL_GAP = 10.0
_GAP_STEPS = 2.05
# Planes are at most this many times closer than slices typically are.
_FINEST = 5
# Planes that lie this close, in mm, to a slice are copies of it. Headers round positions to 0.1 mm at worst.
_ON_SLICE = 0.06


def largest_small_gap(layout: Layout) -> float:
    """Returns the largest distance between slices, in mm, that is no gap that could hide a structure."""
    return max(_SMALL_GAP, _GAP_STEPS * layout.typical_step)


def large_gaps(layout: Layout) -> list[int]:
    """Returns the places that large gaps follow; a gap of exactly the limit is none, however positions are rounded."""
    most = largest_small_gap(layout) + _ON_SLICE
    return [int(k) for k in np.flatnonzero(np.diff(layout.distances) > most)]


def regular_step(distances: np.ndarray) -> float:
    """Returns the step, in mm, of planes that begin at the first and end at the last slice.

    It is the largest step of which all distances are multiples within 0.06 mm, so that every slice is a plane of the
    result. Where there is none down to a fifth of the typical step, it is about the smallest distance between slices,
    and planes lie between slices.

    Args:
        distances: (slices,) rising distances from the first slice in mm.
    """
    steps, span = np.diff(distances), float(distances[-1])
    typical, smallest = float(np.median(steps)), float(steps.min())
    finest = typical / _FINEST
    candidates = {step / divisor for step in (typical, smallest) for divisor in range(1, _FINEST + 1)}
    for candidate in sorted((step for step in candidates if step >= finest), reverse=True):
        step = span / max(1, round(span / candidate))
        if np.abs(np.round(distances / step) * step - distances).max() <= _ON_SLICE:
            return step
    return span / np.ceil(span / max(smallest, finest) - 1e-6)


def resample_planes(array: np.ndarray, layout: Layout, step: float, where: Path) -> np.ndarray:
    """Interpolates slices linearly, along the line of their positions, to planes of equal steps.

    Planes in a large gap, farther from a slice than half the typical step, are air.

    Args:
        array: (slices, rows, columns) of HU, one slice per place of `layout`.
        layout: Where the slices lie.
        step: The distance between planes in mm.
        where: The folder, for errors.

    Returns:
        (columns, rows, planes), float32.

    Raises:
        InputError: The result would have more than 2 · 10⁹ voxels.
    """
    count = round(float(layout.distances[-1]) / step) + 1
    _, rows, columns = array.shape
    if count * rows * columns > MOST_VOXELS:
        raise InputError(
            f"the volume would have {columns} × {rows} × {count} voxels because its slices are {step:.2g} mm apart "
            f"over {layout.distances[-1]:.0f} mm",
            where=str(where),
            hint="remove the slices that lie far from the others",
        )
    out = np.full((columns, rows, count), AIR, dtype=np.float32)
    gaps, near = set(large_gaps(layout)), layout.typical_step / 2 + _ON_SLICE
    for plane in range(count):
        at = plane * step
        closest = int(np.abs(layout.distances - at).argmin())
        offset = at - float(layout.distances[closest])
        lower = max(0, min(closest if offset >= 0 else closest - 1, len(layout.distances) - 2))
        if abs(offset) <= _ON_SLICE:
            out[:, :, plane] = array[closest].T
        elif lower not in gaps:
            weight = (at - layout.distances[lower]) / (layout.distances[lower + 1] - layout.distances[lower])
            out[:, :, plane] = ((1 - weight) * array[lower] + weight * array[lower + 1]).T
        elif abs(offset) <= near:
            out[:, :, plane] = array[closest].T
    return out


def layout_notes(layout: Layout, step: float) -> list[str]:
    """Returns sentences about the tilt of the gantry, irregular steps and gaps."""
    notes = []
    if layout.tilt > 0.1:
        notes.append(
            f"the gantry is tilted by {layout.tilt:.1f}°: the volume and its masks have a sheared affine, which "
            "viewers based on ITK refuse"
        )
    if layout.step is None:
        steps, typical = np.diff(layout.distances), layout.typical_step
        notes.append(
            f"the distance between slices varies from {steps.min():.4g} to {steps.max():.4g} mm: they are interpolated "
            f"from where they lie to planes {step:.4g} mm apart, and masks have these planes"
        )
        missing = _missing(steps, typical)
        if missing:
            after = ", ".join(f"{count} after slice {k + 1}" for k, count in list(missing.items())[:5])
            notes.append(f"slices seem to be missing: about {after} of {len(steps) + 1}")
        gaps = large_gaps(layout)
        if gaps:
            sizes = ", ".join(f"{steps[k]:.4g} mm after slice {k + 1}" for k in gaps[:5])
            notes.append(f"the volume is air in gaps between slices, where nothing can be segmented: {sizes}")
    elif step > _SMALL_GAP:
        notes.append(f"slices are {step:.4g} mm apart: smaller structures may lie between them")
    return notes


def _missing(steps: np.ndarray, typical: float) -> dict[int, int]:
    """Returns how many slices seem to be missing after a slice, by its index.

    Three large steps in a row, or more than a third of all, are no missing slices but other distances between slices.
    """
    counts = {k: round(float(step) / typical) - 1 for k, step in enumerate(steps) if step > 1.5 * typical}
    in_a_row = any(k + 1 in counts and k + 2 in counts for k in counts)
    return {} if in_a_row or 3 * len(counts) > len(steps) else counts
