"""Notes on axes that were exchanged: sizes of a header in another order, or an array of (z, y, x) under an affine of
(x, y, z).

All thresholds are our choice. benchmarks/results/doubtful_values.md has how often real scans and made faults reach
them.
"""

from __future__ import annotations

import itertools

import numpy as np

from mome.volumes.orientation import closest_axes

_FEWEST_VOXELS, _FEWEST_SIDE, _SAMPLE = 30_000, 16, 100_000
# Neighbours of the right order are less unlike than those of any other one, by this factor at least.
_LESS_UNLIKE = 0.9
# Voxels are compared on about this many per axis; mirror images on half as many.
_PER_AXIS = 56
_TISSUE, _CLIP = -300.0, 300.0
# Where axes are exchanged, what is called head to foot runs from left to right: mirror images are alike, more so than
# along the axis that is called left to right, and values change more steeply. In half a patient nothing is alike.
_ALIKE, _MORE_ALIKE, _STEEPER, _MOST_AT_FACES = 0.75, 0.1, 1.3, 0.05
# Sides of a scanner's matrix, and how much voxels differ that are not of one plane.
_SMALLEST_MATRIX, _OTHER_SPACING = 256, 1.2


def doubtful_axes(array: np.ndarray, affine: np.ndarray) -> list[str]:
    """Returns notes on axes that seem to be exchanged.

    Args:
        array: (i, j, k), HU, finite.
        affine: (4, 4), from voxels to mm in RAS.
    """
    if array.size < _FEWEST_VOXELS or min(array.shape) < _FEWEST_SIDE:
        return []
    other = _other_sizes(array)
    if other is not None:
        stated, better = (" × ".join(map(str, sizes)) for sizes in (array.shape, other))
        return [f"neighbouring voxels fit better as {better} than as {stated}: are the sizes in another order?"]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if _has_square_across(array.shape, spacing) or _lies_on_its_side(array, affine, spacing):
        return [
            "the axes of the array seem not to be those of the affine: is it an array (z, y, x), as of SimpleITK, with "
            "an affine of (x, y, z)?"
        ]
    return []


def _other_sizes(array: np.ndarray) -> tuple[int, ...] | None:
    """Returns the order of the sizes in which neighbours are clearly more alike; None where it is the stated one.

    The first axis runs fastest in files. With sizes (a, b, c), the neighbours of a voxel along the second and the third
    axis are a and a·b voxels away.
    """
    rng = np.random.default_rng(0)
    start = rng.integers(0, array.size, _SAMPLE)
    values = array[np.unravel_index(start, array.shape, order="F")]
    unlike: dict[int, float] = {}

    def difference(distance: int) -> float:
        if distance not in unlike:
            there = start + distance
            inside = there < array.size
            other = array[np.unravel_index(there[inside], array.shape, order="F")]
            unlike[distance] = float(np.abs(values[inside] - other).mean()) if inside.any() else np.inf
        return unlike[distance]

    here = (array.shape[0], array.shape[0] * array.shape[1])
    found: list[tuple[float, tuple[int, ...]]] = []
    for sizes in sorted(set(itertools.permutations(array.shape))):
        there = (sizes[0], sizes[0] * sizes[1])
        changed = [(a, b) for a, b in zip(there, here, strict=True) if a != b]
        if changed and all(difference(a) < _LESS_UNLIKE * difference(b) for a, b in changed):
            found.append((sum(map(difference, there)), sizes))
    return min(found)[1] if found else None


def _has_square_across(shape: tuple[int, ...], spacing: np.ndarray) -> bool:
    """Says whether two sides are those of a scanner's matrix, and two voxel sizes are equal, but along other axes."""
    pairs = list(itertools.combinations(range(3), 2))
    sides = [pair for pair in pairs if shape[pair[0]] == shape[pair[1]]]
    sizes = [pair for pair in pairs if abs(spacing[pair[0]] / spacing[pair[1]] - 1) < 1e-3]
    if len(sides) != 1 or len(sizes) != 1 or sides == sizes:
        return False
    i, j = sides[0]
    return bool(shape[i] >= _SMALLEST_MATRIX and max(spacing[i] / spacing[j], spacing[j] / spacing[i]) > _OTHER_SPACING)


def _lies_on_its_side(array: np.ndarray, affine: np.ndarray, spacing: np.ndarray) -> bool:
    """Says whether head and foot seem to lie to the left and right."""
    directions = [world for world, _ in closest_axes(affine)]
    x, y, z = (directions.index(world) for world in range(3))
    steps = [max(1, side // _PER_AXIS) for side in array.shape]
    coarse = array[:: steps[0], :: steps[1], :: steps[2]]
    tissue = coarse > _TISSUE
    places = np.nonzero(tissue)
    # A crop through the body may look like anything. With exchanged axes, only the faces to the left and right cut it.
    if not places[0].size or max(_share_at_faces(tissue, axis) for axis in (y, z)) > _MOST_AT_FACES:
        return False
    box = tuple(slice(int(place.min()), int(place.max()) + 1) for place in places)
    body = coarse[box].clip(-_CLIP, _CLIP)
    if min(body.shape) < _FEWEST_SIDE // 2:
        return False
    small = _halved(body)
    like = {axis: _likeness_of_mirror(small, axis) for axis in (x, z)}
    if like[z] < _ALIKE or like[z] - like[x] <= _MORE_ALIKE:
        return False
    steep = [_steepness(array, axis, steps, box) / spacing[axis] for axis in (x, z)]
    return steep[1] > _STEEPER * steep[0]


def _share_at_faces(tissue: np.ndarray, axis: int) -> float:
    """The larger share of tissue of the first and the last plane along an axis."""
    planes = np.moveaxis(tissue, axis, 0)
    return float(max(planes[0].mean(), planes[-1].mean()))


def _steepness(array: np.ndarray, axis: int, steps: list[int], box: tuple[slice, ...]) -> float:
    """The mean difference of neighbours along an axis, inside a box of the coarse grid."""
    inside = tuple(
        slice(part.start * step, part.stop * step, 1 if other == axis else step)
        for other, (part, step) in enumerate(zip(box, steps, strict=True))
    )
    return float(np.abs(np.diff(array[inside].clip(-_CLIP, _CLIP), axis=axis)).mean())


def _halved(array: np.ndarray) -> np.ndarray:
    """The means of blocks of 2 × 2 × 2 voxels."""
    d, h, w = (side // 2 for side in array.shape)
    return array[: 2 * d, : 2 * h, : 2 * w].reshape(d, 2, h, 2, w, 2).mean(axis=(1, 3, 5))


def _likeness_of_mirror(array: np.ndarray, axis: int) -> float:
    """The largest correlation of a volume with its mirror image along an axis, over all planes near the middle."""
    planes = np.moveaxis(array, axis, 0)
    side, best = len(planes), -1.0
    for shift in range(-(side // 4), side // 4 + 1):
        part = planes[max(0, shift) : min(side, side + shift)]
        first, second = (values - values.mean() for values in (part.reshape(-1), part[::-1].reshape(-1)))
        scale = float(np.sqrt((first**2).sum() * (second**2).sum()))
        if scale > 0:
            best = max(best, float((first * second).sum()) / scale)
    return best
