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
    """A reason to doubt that values are HU.

    Attributes:
        what: A sentence for the user.
        is_hopeless: Whether no structure can be found in such values.
    """

    what: str
    is_hopeless: bool = False


def doubt_about(values: np.ndarray) -> Doubt | None:
    """Returns why the values of a scan cannot be HU; None where they can.

    Args:
        values: All finite values of the scan, in any shape.
    """
    low, high = float(values.min()), float(values.max())
    enough = values.size >= _FEWEST_VOXELS and low < high
    between = f"values lie in [{low:.3g}, {high:.3g}]"
    if low >= 0 and high <= 1:
        return Doubt("values lie in [0, 1]: this looks normalised, not HU", enough)
    sample = _sample(values)
    if low < high and high - low < _NARROWEST:
        kind = "like a label map" if low >= 0 and (sample == np.rint(sample)).all() else "normalised"
        return Doubt(f"{between}: this looks {kind}, not HU", enough)
    if low < high and low > -_ROUNDING and high < 256 + _ROUNDING:
        # A crop inside an organ has such values, too, but no peak of air at the lowest one.
        has_air_peak = enough and _share(sample, low, low + _ROUNDING) >= 0.05
        if low >= 0 or has_air_peak:
            return Doubt(f"{between}: this looks like an 8-bit picture or a label map, not HU", has_air_peak)
        return None
    if enough and _has_offset(sample, low):
        return Doubt(
            "air lies near 0 and soft tissue near 1024: the values are HU with an offset of 1024 that the file does "
            "not give; subtract 1024"
        )
    if low >= 0 and high > 900:
        return Doubt("no value is below 0: HU may be stored with an offset of 1024 that the file does not give")
    if low >= 0:
        return Doubt(f"values lie in [0, {high:.3g}], so no voxel is air or fat: are they HU?")
    return _by_peaks(sample, low, high) if enough else None


def _has_offset(sample: np.ndarray, low: float) -> bool:
    """Says whether air lies near 24 and soft tissue near 1064. Padding at the lowest value is left aside."""
    inside = sample[sample > low + 1]
    soft, air, bone_if_hu = (_share(inside, *span) for span in ((924, 1174), (-150, 150), (200, 800)))
    return soft >= 0.02 and soft > bone_if_hu and air >= 0.02 and _share(inside, -1100, -850) < 0.01


def _by_peaks(sample: np.ndarray, low: float, high: float) -> Doubt | None:
    """Says where the peak of air or of soft tissue is not where HU have it."""
    inside = sample[sample > low + 1]
    if inside.size >= _FEWEST_VOXELS and 0 < inside.max() - inside.min() < _NARROWEST:
        return Doubt(
            f"apart from {low:.5g}, values lie in [{inside.min():.3g}, {inside.max():.3g}]: this looks normalised, "
            "not HU"
        )
    # Near −100 HU, only a peak narrower than that of fat is one of air, or of values that were cut off.
    width = 15 if low > _SOFT_TISSUE[0] else 50
    soft, lowest = _share(sample, *_SOFT_TISSUE), _share(sample, low, low + width)
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


def _sample(values: np.ndarray) -> np.ndarray:
    """Returns every n-th value of a large array, in one dimension."""
    step = -(-values.size // _SAMPLE)
    # An odd step does not stay in the same columns of an image.
    return values.reshape(-1)[:: step + 1 - step % 2]


def _share(sample: np.ndarray, low: float, high: float) -> float:
    """Returns the share of values from `low` to `high`."""
    return float(((sample >= low) & (sample <= high)).mean()) if sample.size else 0.0
