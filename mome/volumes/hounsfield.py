"""Recognises scans whose values cannot be HU, by their range and by the peaks of air and soft tissue.

Air is −1000 HU, fat about −100 HU, soft tissue 0 to 80 HU. The thresholds are our choice; whole scans of the chest,
abdomen, head and neck, and crops of them, stay below them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mome.volumes.beyond_hu import beyond_hu
from mome.volumes.value_sample import SortedValues, ValueSample
from mome.volumes.voxel_order import Differences, is_noise

# Smaller arrays have no histogram worth reading; they get notes only.
_FEWEST_VOXELS = 1_000
# Values whose squares are summed at once, so that no copy in float64 is made of all.
_VALUES_AT_ONCE = 2_000_000
# Values of a CT span some thousand HU; normalised values span less than this.
_NARROWEST = 30.0
# Interpolation of an 8-bit picture leaves its range by some units.
_ROUNDING = 8.0
_AIR, _DARKER_THAN_FAT = (-1100.0, -850.0), (-1300.0, -200.0)
_SOFT_TISSUE = (-200.0, 200.0)
_LARGEST_HU = 32_767.0
# Where HU of air lie that were stored as unsigned 16-bit numbers, also after an intercept of −1,024.
_WRAPPED_AIR = (63_200.0, 65_535.0)
# Scanners give no smaller values than about −1,300 HU, apart from one value of padding.
_SMALLEST_HU = -1_300.0
# A scan with fewer different values is drawn, and has peaks where its painter chose.
_FEWEST_VALUES = 100
# The darkest peak of a CT is air or lung; no tissue has a narrow peak here.
_NO_AIR = (-650.0, -180.0)
# Vessels and organs with contrast lie up to some hundred HU, and fill whole crops.
_TISSUE_PEAK, _FEWEST_BEYOND_CONTRAST = (-150.0, 200.0), 300_000
# A crop of fewer voxels may hold no air.
_WHOLE_SCAN = 600_000
# Means of z-scores × 1,000 are smaller.
_LARGEST_MEAN = 11.0
_FACTORS = (10.0, 2.0, 0.5, 0.1)
_OFFSETS = (-1024.0, -1000.0, -8192.0, 8192.0, 1024.0, 1000.0, 2048.0, 2000.0, 31_744.0, 32_768.0)


@dataclass(frozen=True)
class Doubt:
    """A reason to doubt that values are HU.

    Attributes:
        what: A sentence for the user.
        is_hopeless: Whether no structure can be found in such values.
    """

    what: str
    is_hopeless: bool = False


def doubt_about(
    values: np.ndarray,
    differences: Differences | None = None,
    known: ValueSample | None = None,
) -> Doubt | None:
    """Returns why the values of a scan cannot be HU; None where they can.

    Args:
        values: All finite values of the scan. Where they are in their three-dimensional shape, noise is recognised.
        differences: Those of their neighbours, where they are computed once for several tests.
        known: Their range and sample, where they are found once for several tests.
    """
    known = known or ValueSample(values)
    low, high = known.low, known.high
    enough = values.size >= _FEWEST_VOXELS and low < high
    between = f"values lie in [{low:.3g}, {high:.3g}]"
    if values.size >= _FEWEST_VOXELS and (what := beyond_hu(known)):
        return Doubt(what, is_hopeless=True)
    if low == high and values.size >= _FEWEST_VOXELS:
        return Doubt(f"all voxels have the value {low:.5g}: there is no patient in this scan")
    if low >= 0 and high <= 1:
        return Doubt("values lie in [0, 1]: this looks normalised, not HU", enough)
    sample = known.sorted
    if low < high and high - low < _NARROWEST:
        if _AIR[0] <= low and high <= _AIR[1]:
            return Doubt(f"{between}: all voxels are air, there is no patient in this scan")
        kind = "like a label map" if low >= 0 and (sample.values == np.rint(sample.values)).all() else "normalised"
        return Doubt(f"{between}: this looks {kind}, not HU", enough)
    if low < high and low > -_ROUNDING and high < 256 + _ROUNDING:
        # A crop inside an organ has such values, too, but no peak of air at the lowest one.
        has_air_peak = enough and sample.share(low, low + _ROUNDING) >= 0.05
        if has_air_peak or low == 0 or not enough:
            return Doubt(f"{between}: this looks like an 8-bit picture or a label map, not HU", has_air_peak)
        return None
    if enough and (doubt := _wrapped_or_inverted(sample)):
        return doubt
    if enough and (doubt := _other_scale(values, known)):
        return doubt
    if enough and _has_offset(sample, low):
        return Doubt(
            "air lies near 0 and soft tissue near 1024: the values are HU with an offset of 1024 that the file does "
            "not give; subtract 1024"
        )
    if low >= 0:
        return _by_missing_air(sample, high, enough)
    if not enough:
        return None
    if doubt := _by_peaks(sample, low, high):
        return doubt
    if values.ndim == 3 and is_noise(differences or Differences(values)):
        return Doubt(
            "neighbouring voxels differ as much as distant ones: this is noise, or its voxels are in another order or "
            "type than the header says"
        )
    return _flat(sample, low, high)


def _wrapped_or_inverted(sample: SortedValues) -> Doubt | None:
    """Recognises negative HU that were stored as unsigned numbers, and HU of the wrong sign."""
    wrapped = sample.share(*_WRAPPED_AIR)
    if wrapped >= 0.005 and sample.share(-1_100, 4_000) >= 0.02 and sample.share(4_001, 60_000) < 0.02:
        return Doubt(
            f"{wrapped:.0%} of the voxels lie near 65,536: negative HU were stored as unsigned 16-bit numbers; "
            "subtract 65,536 from values above 32,767",
            is_hopeless=True,
        )
    twelve = sample.share(3_036, 3_196)
    if twelve >= 0.03 and sample.values[0] >= 0 and sample.share(0, 120) >= 0.03 and sample.share(900, 1_200) < 0.03:
        return Doubt(
            f"{twelve:.0%} of the voxels lie near 3,096: negative HU were stored as unsigned 12-bit numbers; subtract "
            "4,096 from values above 2,047",
            is_hopeless=True,
        )
    # Padding that was inverted is the highest value; inverted air is no padding.
    highest = sample.values[-1]
    inside = SortedValues(sample.values[: sample.below(highest - 1)]) if highest > 1_150 else sample
    bone = inside.share(-3_100, -250)
    if (
        inside.share(850, 1_100) >= 0.05
        and (inside.above(1_150).size / inside.size if inside.size else 0) < 0.002
        and inside.share(-120, 40) >= 0.02
        and inside.share(-1_100, -850) < 0.01
        and bone >= 0.0005
    ):
        return Doubt(
            "air lies near +1000 and bone below −250: the values are HU with the wrong sign; multiply by −1",
            is_hopeless=True,
        )
    return None


def _other_scale(values: np.ndarray, known: ValueSample) -> Doubt | None:
    """Recognises attenuation coefficients of water 0.0195/mm, and z-scores, that were multiplied by a power of ten."""
    sample = known.sorted
    for water in (195.0, 1950.0):
        air, soft = sample.share(-0.06 * water, 0.06 * water), sample.share(0.95 * water, 1.12 * water)
        if air >= 0.03 and soft >= 0.03 and sample.share(-np.inf, -0.1 * water) < 0.01:
            return Doubt(
                f"air lies near 0 and soft tissue near {water:.0f}: this looks like attenuation × 10,000 per "
                f"{'mm' if water < 1000 else 'cm'}, not HU"
            )
    # A mean in float32 is quick, and wrong by less than this share of the largest value.
    if abs(float(values.reshape(-1).mean())) > _LARGEST_MEAN + 1e-4 * max(abs(known.low), abs(known.high)):
        return None
    mean, deviation = _mean_and_deviation(values)
    if abs(mean) < 0.01 * deviation and any(abs(deviation / scale - 1) < 0.01 for scale in (10.0, 100.0, 1000.0)):
        return Doubt(
            f"the mean is {mean:.2g} and the standard deviation {deviation:.4g}: this looks like z-scores × "
            f"{10 ** round(np.log10(deviation)):g}, not HU"
        )
    return None


def _mean_and_deviation(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean and the standard deviation, block by block, so that no copy in float64 is made of all values."""
    flat = values.reshape(-1)
    blocks = [flat[start : start + _VALUES_AT_ONCE] for start in range(0, flat.size, _VALUES_AT_ONCE)]
    mean = sum(float(block.sum(dtype=np.float64)) for block in blocks) / flat.size
    squares = sum(float(np.square(block - mean, dtype=np.float64).sum()) for block in blocks)
    return mean, (squares / flat.size) ** 0.5


def _has_offset(sample: SortedValues, low: float) -> bool:
    """Says whether air lies near 24 and soft tissue near 1064. Padding at the lowest value is left aside."""
    inside = sample.above(low + 1)
    soft, air, bone_if_hu = (inside.share(*span) for span in ((924, 1174), (-150, 150), (200, 800)))
    # Bone has no narrow peak near 1024, and values of another unit reach far below air.
    is_narrow = soft >= 2 * max(inside.share(1175, 1425), inside.share(600, 850))
    is_air_elsewhere = inside.share(-1100, -850) >= 0.01 or inside.share(-np.inf, _SMALLEST_HU) >= 0.005
    # Values near 65,536 are wrapped negative numbers, not an offset.
    if sample.share(60_000, 65_535) >= 0.0005:
        return False
    return soft >= 0.02 and soft > bone_if_hu and is_narrow and air >= 0.02 and not is_air_elsewhere


def _by_missing_air(sample: SortedValues, high: float, enough: bool) -> Doubt | None:
    """Judges values of which none is below 0."""
    low, middle = float(sample.values[0]), float(np.median(sample.values))
    if enough and low == 0 and sample.share(0, 0) >= 0.05 and _is_label_map(sample):
        return Doubt(
            f"values lie in [0, {high:,.0f}], and few different ones occur: this looks like a label map, not HU",
            is_hopeless=True,
        )
    if enough and high <= 900 and middle < 600 and not _has_peak_at_lowest(sample, low, 15):
        return None  # a crop of vessels and organs
    if enough and (likely := _likely(sample)):
        return Doubt(f"no value is below 0, and the file gives no offset{likely}")
    if high > _LARGEST_HU or (enough and sample.share(5_000, np.inf) >= 0.02):
        return Doubt(
            f"values lie in [0, {high:,.0f}] and no value is below 0: this looks like a 16-bit picture, or HU with an "
            "offset and a factor that the file does not give"
        )
    if high > 900:
        return Doubt("no value is below 0: HU may be stored with an offset of 1024 that the file does not give")
    return Doubt(f"values lie in [0, {high:.3g}], so no voxel is air or fat: are they HU?")


def _is_label_map(sample: SortedValues) -> bool:
    """Says whether few different values occur, all of them whole numbers. Noise gives a CT hundreds."""
    found = np.unique(sample.values)
    return found.size < _FEWEST_VALUES and bool((found == np.rint(found)).all())


def _by_peaks(sample: SortedValues, low: float, high: float) -> Doubt | None:
    """Says where the peak of air or of soft tissue is not where HU have it."""
    inside = sample.above(low + 1)
    if inside.size >= _FEWEST_VOXELS:
        first, last = inside.values[0], inside.values[-1]
        if 0 < last - first < _NARROWEST and not (_AIR[0] <= first and last <= _AIR[1]):
            return Doubt(
                f"apart from {low:.5g}, values lie in [{first:.3g}, {last:.3g}]: this looks normalised, not HU"
            )
    soft, dark = sample.share(*_SOFT_TISSUE), sample.share(*_DARKER_THAN_FAT)
    if soft < 0.02:
        if dark > 0.9:
            return Doubt(f"{dark:.1%} of the voxels are as dark as air or lung: is there a patient in this scan?")
        return Doubt(
            f"only {soft:.1%} of the voxels lie between −200 and 200, where fat and soft tissue lie in HU: "
            f"values from {low:.5g} to {high:.5g} may have another offset or unit{_likely(sample)}"
        )
    # Near −100 HU, only a peak narrower than that of fat is one of air, or of values that were cut off.
    if low > -800 and _has_peak_at_lowest(sample, low, 15 if low > _SOFT_TISSUE[0] else 50):
        share = sample.share(low, low + 50)
        return Doubt(
            f"{share:.0%} of the voxels lie near the lowest value, {low:.4g}, and air is −1000 HU: "
            f"the values are cut off there, or have another unit{_likely(sample)}"
        )
    below = inside.values[: inside.below(_SMALLEST_HU)]
    # One value is padding; many are tissue in another unit.
    if below.size >= 0.005 * sample.size and below[-1] - below[0] > _NARROWEST:
        return Doubt(
            f"{below.size / sample.size:.1%} of the voxels lie below {_SMALLEST_HU:,.0f}, and air is −1000 HU: values "
            f"from {low:.5g} to {high:.5g} may have another offset or unit{_likely(sample)}"
        )
    if doubt := _peaks_elsewhere(sample, low):
        return doubt
    if high > _LARGEST_HU:
        return Doubt(f"values reach {high:,.0f}, more than any metal in HU: are they HU?")
    return _cut_off_above(sample, high)


def _peaks_elsewhere(sample: SortedValues, low: float) -> Doubt | None:
    """Says where the darkest peak is none of air or lung, and the peak of tissue none of fat or soft tissue."""
    zero = sample.share(0, 0)
    if zero >= 0.05 and zero > 10 * sample.share(1, 2):
        return Doubt(f"{zero:.0%} of the voxels have exactly the value 0, which is water: pad and mask with −1024")
    tenth = [sample.share(*span) for span in ((-112, -88), (-65, -25), (-15, 15))]
    if low > _SOFT_TISSUE[0] and tenth[0] >= 0.1 and tenth[1] < 0.03 and tenth[2] >= 0.1:
        return Doubt("air seems to lie near −100 and soft tissue near 0; they look like HU × 0.1")
    if low > _SOFT_TISSUE[0] and sample.size >= _WHOLE_SCAN:
        return Doubt(f"no voxel is below {low:.4g}, where air and lung lie in HU: are the values HU?{_likely(sample)}")
    air = _lowest_peak(sample.above(low + 1))
    if air is not None and (_NO_AIR[0] < air < _NO_AIR[1] or air < -1_125):
        return Doubt(
            f"the darkest peak lies at {air:.0f}, and air is −1000 HU: the values may have another offset or unit"
        )
    tissue = SortedValues(sample.values[sample.up_to(-400) : sample.below(400)])
    if sample.share(*_DARKER_THAN_FAT) < 0.1 or tissue.size < _FEWEST_VOXELS:
        return None
    counts, edges = tissue.histogram(40, -400, 400)
    smooth = np.convolve(counts, (1, 1, 1), "same")
    peak = float(edges[int(smooth.argmax())] + 10)
    beyond = peak > _TISSUE_PEAK[1] and sample.size >= _FEWEST_BEYOND_CONTRAST
    if (peak < _TISSUE_PEAK[0] or beyond) and smooth.max() > 2.5 * smooth.mean():
        return Doubt(
            f"the peak of tissue lies at {peak:.0f}; fat is −100 HU and soft tissue 0 to 80: values may have another "
            "offset or unit"
        )
    return None


def _lowest_peak(inside: SortedValues) -> float | None:
    """Returns the darkest narrow peak that holds at least 5 % of the voxels below −180; None where there is none."""
    dark = SortedValues(inside.values[inside.up_to(-4_000) : inside.below(-180)])
    if dark.size < max(_FEWEST_VOXELS, 0.05 * inside.size):
        return None
    counts, edges = dark.histogram(191, -4_000, -180)
    smooth = np.convolve(counts, np.ones(5), "same")
    best = int(smooth.argmax())
    return float(edges[best] + 10) if smooth[best] >= 0.5 * dark.size else None


def _has_peak_at_lowest(sample: SortedValues, low: float, width: float) -> bool:
    """Says whether at least 5 % of the voxels lie near the lowest value, and fewer above it."""
    lowest, above = sample.share(low, low + width), sample.share(low + width, low + 2 * width)
    return lowest >= 0.05 and above < lowest / 2


def _cut_off_above(sample: SortedValues, high: float) -> Doubt | None:
    """Recognises a window: many voxels have exactly the highest value, and few lie just below it."""
    top, below = sample.up_to(high) - sample.below(high), sample.below(high) - sample.below(high - 20)
    is_window = high < 1_500 and top >= max(20, 0.001 * sample.size) and top > 3 * below
    if is_window and np.unique(sample.values).size >= _FEWEST_VALUES:
        return Doubt(f"{top / sample.size:.1%} of the voxels have exactly {high:.5g}: the values are cut off there")
    return None


def _likely(sample: SortedValues) -> str:
    """Returns the factor or the offset that would explain where air and soft tissue lie, as the end of a sentence."""
    for factor in _FACTORS:
        air, soft = (sample.share(low * factor, high * factor) for low, high in ((-1060, -900), (-20, 100)))
        if air >= 0.03 and soft >= 0.03:
            return f"; they look like HU × {factor:g}"
    for offset in _OFFSETS:
        air, soft = (sample.share(low + offset, high + offset) for low, high in ((-1060, -900), (-20, 100)))
        if air >= 0.03 and soft >= 0.03:
            return f"; they look like HU {'+' if offset > 0 else '−'} {abs(offset):g}"
    return ""


def _flat(sample: SortedValues, low: float, high: float) -> Doubt | None:
    """Recognises an equalised histogram, in which all values are equally frequent. A CT has peaks."""
    counts, _ = sample.histogram(20, low, high)
    if counts.min() < 0.6 * counts.mean() or counts.max() > 1.4 * counts.mean():
        return None
    return Doubt("all values are about equally frequent: the histogram was equalised, and the values are not HU")
