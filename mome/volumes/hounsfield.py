"""Recognises scans whose values cannot be HU, by their range and by the peaks of air and soft tissue.

Air is −1000 HU, fat about −100 HU, soft tissue 0 to 80 HU. The thresholds are our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Smaller arrays have no histogram worth reading; they get notes only.
_FEWEST_VOXELS = 1_000
_SAMPLE = 2_000_000
# Values of a CT span some thousand HU; normalised values span less than this.
_NARROWEST = 30.0
# Interpolation of an 8-bit picture leaves its range by some units.
_ROUNDING = 8.0
_SOFT_TISSUE = (-200.0, 200.0)
_LARGEST_HU = 32_767.0


@dataclass(frozen=True)
class Doubt:
    """Why values are not HU.

    Attributes:
        what: A sentence for the user.
        is_hopeless: Whether no structure can be found in such values.
    """

    what: str
    is_hopeless: bool = False


def doubt_about(array: np.ndarray) -> Doubt | None:
    """Returns why the values of a scan cannot be HU; None where they can.

    Args:
        array: (i, j, k), finite.
    """
    low, high = float(array.min()), float(array.max())
    enough = array.size >= _FEWEST_VOXELS and low < high
    if low >= 0 and high <= 1:
        return Doubt("values lie in [0, 1]: this looks normalised, not HU", enough)
    if low < high and high - low < _NARROWEST:
        return Doubt(f"values lie in [{low:.3g}, {high:.3g}]: this looks normalised, not HU", enough)
    if low > -_ROUNDING and high < 256 + _ROUNDING and low < high:
        # A crop inside an organ has such values, too, but no peak of air at the lowest one.
        has_air_peak = enough and _share(array, low, low + _ROUNDING) >= 0.05
        return (
            Doubt(f"values lie in [{low:.3g}, {high:.3g}]: this looks like an 8-bit picture, not HU", has_air_peak)
            if low >= 0 or has_air_peak
            else None
        )
    if enough and low > _SOFT_TISSUE[0] and _share(array, 824, 1224) >= 0.02 and _share(array, low, 150) >= 0.05:
        return Doubt(
            "air lies near 0 and soft tissue near 1024: the values are HU with an offset of 1024 that the file does "
            "not give; subtract 1024"
        )
    if low >= 0:
        return _without_negative(high)
    if enough:
        return _by_peaks(array, low, high)
    return None


def _without_negative(high: float) -> Doubt:
    """Values of 0 and more: HU + 1024, or raw numbers of a detector or a picture."""
    if high > 900:
        return Doubt("no value is below 0: HU may be stored with an offset of 1024 that the file does not give")
    return Doubt(f"values lie in [0, {high:.3g}], so no voxel is air or fat: are they HU?")


def _by_peaks(array: np.ndarray, low: float, high: float) -> Doubt | None:
    """Says where the peak of air or of soft tissue is not where HU have it."""
    # Near −100 HU, only a peak narrower than that of fat is one of air, or of values that were cut off.
    width = 15 if low > _SOFT_TISSUE[0] else 50
    soft, lowest = _share(array, *_SOFT_TISSUE), _share(array, low, low + width)
    if soft < 0.02:
        return Doubt(
            f"only {soft:.1%} of the voxels lie between −200 and 200, where fat and soft tissue lie in HU: "
            f"values from {low:.5g} to {high:.5g} may have another offset or unit"
        )
    if lowest >= 0.05 and low > -800:
        return Doubt(
            f"{lowest:.0%} of the voxels lie near the lowest value, {low:.4g}, and air is −1000 HU: "
            "the values are cut off there, or have another unit"
        )
    if high > _LARGEST_HU:
        return Doubt(f"values reach {high:,.0f}, more than any metal in HU: are they HU?")
    return None


def _share(array: np.ndarray, low: float, high: float) -> float:
    """The share of voxels from `low` to `high`, of every n-th voxel of a large array."""
    step = max(1, int(np.ceil((array.size / _SAMPLE) ** (1 / 3))))
    sample = array[::step, ::step, ::step]
    return float(((sample >= low) & (sample <= high)).mean())
