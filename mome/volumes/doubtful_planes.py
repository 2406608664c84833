"""Notes on planes of a volume that were copied or repeated, or whose values jump as a missing intercept makes them."""

from __future__ import annotations

import numpy as np

# The planes along the last axis, which are the slices in nearly all files, are compared on a sample (our choice).
_STEP = 4
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# An intercept is about −1,024 HU. Anatomy never moves every quantile by as much from one plane to the next.
_SMALLEST_JUMP, _MOST_SPREAD = 500.0, 150.0
# A scan that was resampled by nearest neighbours has copies at equal distances, and many of them.
_MANY_COPIES = 0.2
_COPIED = "have the same pixels as the slice before"


def doubtful_planes(array: np.ndarray, known: tuple[str, ...]) -> list[str]:
    """Returns notes on planes along the last axis.

    Args:
        array: (i, j, k), HU, finite.
        known: Notes that the volume already has; a copy that is in them is not said twice.
    """
    sample = array[::_STEP, ::_STEP]
    if array.shape[2] < 2 or sample[:, :, 0].size < 16:
        return []
    notes = []
    same = (sample[:, :, 1:] == sample[:, :, :-1]).all(axis=(0, 1))
    copied = [k + 1 for k in np.flatnonzero(same) if _is_copy(array[:, :, k], array[:, :, k + 1])]
    if copied and not any(_COPIED in note for note in known):
        many = len(copied) >= _MANY_COPIES * array.shape[2]
        question = "was the scan made finer by nearest neighbours?" if many else "was one copied?"
        notes.append(f"{len(copied)} planes {_COPIED}, at another place, as plane {copied[0] + 1}: {question}")
    if len(copied) < _MANY_COPIES * array.shape[2]:
        notes += [note for axis in range(3) if (note := _repeated_block(array, axis))]
    changes = np.diff(np.quantile(sample, _QUANTILES, axis=(0, 1)), axis=1)
    jumps = (np.ptp(changes, axis=0) < _MOST_SPREAD) & (np.abs(changes.mean(axis=0)) > _SMALLEST_JUMP)
    # Planes of one value are padding.
    inside = np.ptp(sample, axis=(0, 1)) > _MOST_SPREAD
    places = np.flatnonzero(jumps & inside[1:] & inside[:-1])
    if places.size:
        k = int(places[0])
        notes.append(
            f"all values change by about {changes[:, k].mean():+.0f} from plane {k + 1} to plane {k + 2}: do some "
            "planes lack their intercept?"
        )
    return notes


def _repeated_block(array: np.ndarray, axis: int) -> str | None:
    """Returns a note where planes that are no neighbours are equal. Two planes of a scanner never are."""
    planes = np.moveaxis(array, axis, 0)
    sample = np.ascontiguousarray(planes[:, ::_STEP, ::_STEP])
    varied = np.flatnonzero(np.ptp(sample.reshape(len(sample), -1), axis=1) > _MOST_SPREAD)
    first_of: dict[bytes, int] = {}
    pairs: list[tuple[int, int]] = []
    for k in varied.tolist():
        other = first_of.setdefault(sample[k].tobytes(), k)
        # Equal neighbours are copies, which have a note of their own.
        if k - other > 1 and not np.array_equal(planes[k - 1], planes[k]) and np.array_equal(planes[other], planes[k]):
            pairs.append((other, k))
    if not pairs:
        return None
    (here, there), name = pairs[0], "ijk"[axis]
    return (
        f"{len(pairs)} planes of axis {name} stand twice, as plane {here + 1} again at {there + 1}: was a part of the "
        "scan repeated?"
    )


def _is_copy(plane: np.ndarray, following: np.ndarray) -> bool:
    return bool((plane != plane.flat[0]).any() and np.array_equal(plane, following))
