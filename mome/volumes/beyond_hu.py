"""Recognises values that are too large for HU of any offset, as after a wrong factor in a header."""

from __future__ import annotations

from mome.volumes.value_sample import SortedValues, ValueSample

# Metal reaches the first in 16 bits with a sign; numbers of 16 bits without a sign reach the second.
_LARGEST_HU, _LARGEST_16_BIT = 32_767.0, 65_535.0
# Our choice. Interpolation between padding and air leaves fewer voxels that are so far from HU.
_MOST_BEYOND, _FEWEST_FAR_BEYOND = 0.2, 0.01


def beyond_hu(known: ValueSample) -> str | None:
    """Returns a sentence where values cannot be HU by their size alone, else None.

    One lowest and one highest value are left aside as padding. Values that 16 bits hold are left to other tests:
    they may be HU with an offset.

    Args:
        known: The range of the values and their sample.
    """
    if max(-known.low, known.high) <= _LARGEST_16_BIT:
        return None
    sample = known.sorted
    inside = SortedValues(sample.values[sample.up_to(known.low) : sample.below(known.high)])
    if not inside.size:  # at most two values: neither is padding
        inside = sample
    beyond = 1 - inside.share(-_LARGEST_HU, _LARGEST_HU)
    far_beyond = 1 - inside.share(-_LARGEST_16_BIT, _LARGEST_16_BIT)
    if beyond < _MOST_BEYOND or far_beyond < _FEWEST_FAR_BEYOND:
        return None
    return (
        f"{beyond:.0%} of the voxels lie beyond ±{_LARGEST_HU:,.0f}, where no HU lie; values are from "
        f"{known.low:.4g} to {known.high:.4g}: is the factor in the header right?"
    )
