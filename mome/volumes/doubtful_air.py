"""Notes on air that lies beside −1000 HU: an offset or a factor of about a tenth, which leaves tissue plausible.

All thresholds are our choice. benchmarks/results/doubtful_values.md has how often real scans and made faults reach
them.
"""

from __future__ import annotations

import numpy as np

from mome.volumes.value_sample import SortedValues, ValueSample

_FEWEST_VOXELS = 30_000
# Air and lung, and the largest share of them that a window of 40 HU holds in scans of the lung.
_DARK, _WINDOW, _NARROW = (-1400.0, -600.0), 40.0, 0.5
_TOO_BRIGHT = (-935.0, -800.0)
# Values around air. Scanners clip at −1,024, and noise puts less than a third of them below the limit.
_AIR, _TOO_DARK, _MOST_TOO_DARK = (-1300.0, -945.0), -1045.0, 0.35
_FEWEST_SHARE = 0.0005


def doubtful_air(array: np.ndarray, known: ValueSample | None = None) -> list[str]:
    """Returns a note where the peak of air is not where HU have it.

    Args:
        array: HU, finite, any shape.
        known: Its range and sample, where they are found once for several tests.
    """
    sample = (known or ValueSample(array)).sorted
    if sample.size < _FEWEST_VOXELS:
        return []
    place = _air_peak(sample)
    if place is not None and _TOO_BRIGHT[0] < place < _TOO_BRIGHT[1]:
        return [_note(place)]
    low = float(sample.values[0])
    # One lowest value that many voxels have is padding.
    inside = sample.above(low + 1) if sample.up_to(low + 1) / sample.size > 0.02 else sample
    air = SortedValues(inside.values[inside.up_to(_AIR[0]) : inside.below(_AIR[1])])
    too_dark = air.values[: air.below(_TOO_DARK)]
    if air.size < max(200, _FEWEST_SHARE * sample.size) or too_dark.size / air.size < _MOST_TOO_DARK:
        return []
    return [_note(float(np.median(too_dark)))]


def _air_peak(sample: SortedValues) -> float | None:
    """Returns the place of a peak that holds at least half of all air and lung; None where there is none."""
    dark = SortedValues(sample.values[sample.below(_DARK[0]) : sample.below(_DARK[1])])
    if dark.size < 0.02 * sample.size:
        return None
    counts, edges = dark.histogram(80, *_DARK)
    best = int(np.convolve(counts, np.ones(4), "same").argmax())
    near = dark.values[np.abs(dark.values - edges[best]) <= _WINDOW / 2]
    return float(np.median(near)) if near.size >= _NARROW * dark.size else None


def _note(place: float) -> str:
    return f"air lies near {place:.0f}, and air is −1000 HU: the values may have an offset or a factor"
