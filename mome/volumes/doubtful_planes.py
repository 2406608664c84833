"""Notes on planes of a volume that were copied or repeated, or whose values jump as a missing intercept makes them."""

from __future__ import annotations

import numpy as np

from mome.volumes.plane_counts import count_in_planes

# The planes along the last axis, which are the slices in nearly all files, are compared on a sample (our choice).
_STEP = 4
# Planes that differ on a coarser sample, which is a part of the other, are not compared further.
_COARSE_STEP = 8 * _STEP
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# An intercept is about −1,024 HU. Anatomy never moves every quantile by as much from one plane to the next.
_SMALLEST_JUMP, _MOST_SPREAD = 500.0, 150.0
# Beyond this, float32 rounds by more than a tenth of one HU.
_LARGEST_EXACT = 1e6
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
    coarse = array[::_COARSE_STEP, ::_COARSE_STEP]
    alike = np.flatnonzero((coarse[:, :, 1:] == coarse[:, :, :-1]).all(axis=(0, 1))).tolist()
    alike = [k for k in alike if np.array_equal(sample[:, :, k], sample[:, :, k + 1])]
    copied = [k + 1 for k in alike if _is_copy(array[:, :, k], array[:, :, k + 1])]
    if copied and not any(_COPIED in note for note in known):
        many = len(copied) >= _MANY_COPIES * array.shape[2]
        question = "was the scan made finer by nearest neighbours?" if many else "was one copied?"
        notes.append(f"{len(copied)} planes {_COPIED}, at another place, as plane {copied[0] + 1}: {question}")
    if len(copied) < _MANY_COPIES * array.shape[2]:
        notes += [note for axis in range(3) if (note := _repeated_block(array, axis))]
    if (jump := _jump(sample)) is not None:
        k, change = jump
        notes.append(
            f"all values change by about {change:+.0f} from plane {k + 1} to plane {k + 2}: do some "
            "planes lack their intercept?"
        )
    return notes


def _jump(sample: np.ndarray) -> tuple[int, float] | None:
    """Returns the first plane after which all values change alike, and the mean change in HU; None where none does.

    Args:
        sample: (i, j, k), HU.
    """
    pairs = _pairs_that_may_jump(sample)
    if not pairs.size:
        return None
    planes = np.union1d(pairs, pairs + 1)
    chosen = sample[:, :, planes]
    quantiles = np.quantile(chosen, _QUANTILES, axis=(0, 1))
    inside = np.ptp(chosen, axis=(0, 1)) > _MOST_SPREAD  # planes of one value are padding
    first = np.searchsorted(planes, pairs)
    changes = quantiles[:, first + 1] - quantiles[:, first]
    jumps = (np.ptp(changes, axis=0) < _MOST_SPREAD) & (np.abs(changes.mean(axis=0)) > _SMALLEST_JUMP)
    places = np.flatnonzero(jumps & inside[first + 1] & inside[first])
    return (int(pairs[places[0]]), float(changes[:, places[0]].mean())) if places.size else None


def _pairs_that_may_jump(sample: np.ndarray) -> np.ndarray:
    """Returns the planes that all quantiles may jump after; for the others one quantile shows that they do not.

    In a jump, every quantile changes by more than `_SMALLEST_JUMP` − `_MOST_SPREAD`. Where the lowest quantile of two
    planes lies in an interval of that length, there is none. The interval is that around the middle plane's.

    Args:
        sample: (i, j, k), HU.
    """
    voxels, count = sample[:, :, 0].size, sample.shape[2]
    width = 0.95 * (_SMALLEST_JUMP - _MOST_SPREAD)  # less, so that rounding does not matter
    low = float(np.quantile(sample[:, :, count // 2], _QUANTILES[0])) - width / 2
    if abs(low) > _LARGEST_EXACT:
        return np.arange(count - 1)
    # The quantile lies between the values of the ranks below and above this one.
    rank = _QUANTILES[0] * (voxels - 1)
    below, up_to = (count_in_planes(sample < limit) for limit in (low, low + width))
    is_within = (below <= np.floor(rank) - 1) & (up_to >= np.ceil(rank) + 2)
    return np.flatnonzero(~(is_within[1:] & is_within[:-1]))


def _repeated_block(array: np.ndarray, axis: int) -> str | None:
    """Returns a note where planes that are no neighbours are equal. Two planes of a scanner never are."""
    planes = np.moveaxis(array, axis, 0)
    coarse = np.ascontiguousarray(planes[:, ::_COARSE_STEP, ::_COARSE_STEP])
    alike: dict[bytes, list[int]] = {}
    for k in range(len(planes)):
        alike.setdefault(coarse[k].tobytes(), []).append(k)
    first_of: dict[bytes, int] = {}
    pairs: list[tuple[int, int]] = []
    for k in sorted(k for group in alike.values() if len(group) > 1 for k in group):
        sample = np.ascontiguousarray(planes[k, ::_STEP, ::_STEP])
        if np.ptp(sample) <= _MOST_SPREAD:
            continue
        other = first_of.setdefault(sample.tobytes(), k)
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
