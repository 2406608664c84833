"""Resampling by affine in torch, slab by slab, from any grid to any other, on the CPU or a GPU.

The way back to a scan's own grid is the same function with the grids exchanged; there is no code that undoes flips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mome.volumes.axis_sampling import AxisSampling, parallel_axes
from mome.volumes.grid import Grid

# Most voxels of one slab; each needs three float32 coordinates.
_SLAB_VOXELS = 4_000_000
# Voxels along the side of a block where grids are oblique to each other: the box of the source that a block reads is
# then not much larger than the block (our choice).
_OBLIQUE_SIDE = 64


def resample(
    array: Tensor | np.ndarray,
    source: Grid,
    target: Grid,
    *,
    mode: str = "linear",
    fill: float = 0.0,
    antialias: bool = True,
    repeat: int | None = None,
) -> Tensor:
    """Returns the values of `array` at the voxel centres of `target`.

    Args:
        array: (i, j, k) or (channels, i, j, k) on `source`; other types than float64 are converted to float32.
        source: The grid of `array`; it may be a block of planes of a larger grid (`Grid.crop`).
        target: The grid of the result; it may be such a block, too.
        mode: `linear` (trilinear) or `nearest`.
        fill: The value outside `source`. Up to half a voxel beyond the outer voxel centres the border value is used.
        antialias: Smooth first along axes whose voxels become larger by more than a factor of 1.2. The filter is a
            Gaussian; its variance is the difference of the variances of boxes of the two voxel sizes (our choice).
        repeat: The axis of `source` along which the border value is used at any distance beyond it.

    Returns:
        (*target.shape) or (channels, *target.shape), float32 (float64 for float64), on the array's device.

    Raises:
        ValueError: `mode` is neither of the two.
    """
    # A flipped numpy view has negative strides, which torch does not support.
    x = torch.as_tensor(np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array)
    x = x if x.dtype == torch.float64 else x.float()
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode is 'linear' or 'nearest', not {mode!r}")
    single = x.ndim == 3
    x = x[None] if single else x
    samplings = parallel_axes(source, target)
    if samplings is None:
        out = _oblique(x, source, target, mode, fill, antialias, repeat)
    else:
        out = _separable(x, target, samplings, mode, fill, antialias, repeat)
    return out[0] if single else out


def _separable(
    x: Tensor, target: Grid, samplings: list[AxisSampling], mode: str, fill: float, antialias: bool, repeat: int | None
) -> Tensor:
    """Resamples one axis at a time, slab by slab along the first target axis; where voxels coincide, it copies."""
    x = x.permute(0, *(1 + sampling.source_axis for sampling in samplings))
    positions = [sampling.at for sampling in samplings]
    outside = [
        torch.as_tensor(sampling.outside & (sampling.source_axis != repeat), device=x.device) for sampling in samplings
    ]
    steps = [abs(sampling.step) for sampling in samplings]
    blurs = [step if antialias and mode == "linear" and step > 1.2 else None for step in steps]
    # A slab's size is the larger of its planes in the target and of the source planes that it reads.
    read = int(np.ceil(steps[0])) * x.shape[2] * x.shape[3]
    per_slab = max(1, _SLAB_VOXELS // max(1, target.shape[1] * target.shape[2], read))
    matrices = [
        None if blur is None else _matrix(sampling, blur).to(device=x.device, dtype=x.dtype)
        for sampling, blur in zip(samplings, blurs, strict=True)
    ]
    margin = 1 if blurs[0] is None else 1 + _reach(blurs[0])
    out = x.new_empty(x.shape[0], *target.shape)
    for start in range(0, target.shape[0], per_slab):
        planes = slice(start, start + per_slab)
        at = positions[0][planes]
        first, last = max(0, int(np.floor(at.min())) - margin), int(np.floor(at.max())) + margin + 1
        slab = x[:, first:last]
        for axis, position in enumerate((at - first, positions[1], positions[2])):
            matrix = matrices[axis]
            if matrix is None:
                slab = _along(slab, axis + 1, position, mode)
            else:
                slab = _multiplied(slab, matrix[planes, first:last] if axis == 0 else matrix, axis + 1)
        missing = outside[0][planes, None, None] | outside[1][None, :, None] | outside[2][None, None, :]
        out[:, planes] = slab.masked_fill_(missing, fill)
    return out


def _matrix(sampling: AxisSampling, blur: float) -> Tensor:
    """Returns the weights (target, source) of smoothing followed by linear interpolation, float64.

    Args:
        sampling: Where the target's voxel centres lie.
        blur: Factor by which voxels become larger; see `_smooth`.
    """
    kernel = _gaussian(blur).numpy()
    reach, size = len(kernel) // 2, sampling.size
    out = np.zeros((len(sampling.at), size))
    rows = np.arange(len(sampling.at))
    for voxel, share in ((sampling.low, 1 - sampling.weight), (sampling.high, sampling.weight)):
        for offset, weight in zip(range(-reach, reach + 1), kernel, strict=True):
            # Beyond the border, the border value is repeated.
            np.add.at(out, (rows, np.clip(voxel + offset, 0, size - 1)), share * weight)
    return torch.from_numpy(out)


def _multiplied(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiplies the vectors of `x` (channels, i, j, k) along one axis by a matrix (new length, length)."""
    if axis == 3:
        return x @ matrix.T
    if axis == 2:
        return matrix @ x
    return (matrix @ x.flatten(2)).unflatten(2, x.shape[2:])


def _along(x: Tensor, axis: int, at: np.ndarray, mode: str) -> Tensor:
    """Interpolates along one axis at the positions `at` (in voxels, inside the array).

    Args:
        x: (channels, i, j, k).
        axis: The axis of `x`.
        at: Positions in voxels.
        mode: `linear` or `nearest`.
    """
    last = x.shape[axis] - 1
    low = np.floor(at).astype(np.int64) if mode == "linear" else np.floor(at + 0.5).astype(np.int64)
    low = np.minimum(low, last)
    weight = at - low
    lower = x.index_select(axis, torch.as_tensor(low, device=x.device))
    if mode != "linear" or not np.any(weight > 0):
        return lower
    high = torch.as_tensor(np.minimum(low + 1, last), device=x.device)
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    fraction = torch.as_tensor(weight, dtype=x.dtype, device=x.device).reshape(shape)
    return torch.lerp(lower, x.index_select(axis, high), fraction)


def _oblique(
    x: Tensor, source: Grid, target: Grid, mode: str, fill: float, antialias: bool, repeat: int | None
) -> Tensor:
    """Resamples with `grid_sample`, block by block: of the source, a block smooths only the box that it reads."""
    matrix = np.linalg.inv(source.affine) @ target.affine
    # For every source axis, the longest step on it that one target voxel makes, along any target axis.
    steps = np.abs(matrix[:3, :3]).max(axis=1)
    blurs = [float(step) if antialias and mode == "linear" and step > 1.2 else None for step in steps]
    margins = [1 if blur is None else 1 + _reach(blur) for blur in blurs]
    out = x.new_full((x.shape[0], *target.shape), fill)
    for block in blocks(target.shape, _OBLIQUE_SIDE):
        box, is_inside = _box_read(matrix, block, source.shape, margins, repeat)
        if any(a >= b for a, b in box):
            continue
        part = x[(slice(None), *(slice(a, b) for a, b in box))]
        for axis, blur in enumerate(blurs):
            part = part if blur is None else _smooth(part, axis + 1, blur)
        unit_IJK3, outside = _places(matrix, block, box, source.shape, x, repeat)
        values = F.grid_sample(
            part[None],
            unit_IJK3[None],
            mode="bilinear" if mode == "linear" else "nearest",
            padding_mode="border",
            align_corners=False,
        )[0]
        if not is_inside:
            values.masked_fill_(outside(), fill)
        out[(slice(None), *(slice(a, b) for a, b in block))] = values
    return out


def blocks(shape: Sequence[int], side: int) -> Iterator[list[tuple[int, int]]]:
    """Yields blocks that fill an array, first and last + 1 voxel along each axis, of at most `side` voxels each."""
    for first in product(*(range(0, length, side) for length in shape)):
        yield [(a, min(a + side, length)) for a, length in zip(first, shape, strict=True)]


def _box_read(
    matrix: np.ndarray, block: list[tuple[int, int]], shape: Sequence[int], margins: Sequence[int], repeat: int | None
) -> tuple[list[tuple[int, int]], bool]:
    """Returns the box of the source that a block of the target reads, and whether all of the block lies inside.

    Args:
        matrix: (4, 4), from target voxels to source voxels.
        block: First and last + 1 target voxel along each axis.
        shape: Voxels of the source.
        margins: Source voxels that are read beyond the positions along each axis.
        repeat: The source axis that has no outside; a block beyond its ends reads the outer voxel.
    """
    corners = np.array([[*corner, 1.0] for corner in product(*((a, b - 1) for a, b in block))])
    places = (corners @ matrix.T)[:, :3]
    low, high = places.min(axis=0), places.max(axis=0)
    if repeat is not None:
        low[repeat], high[repeat] = np.clip([low[repeat], high[repeat]], 0, shape[repeat] - 1)
    box = [
        (max(0, int(np.floor(a)) - margin), min(side, int(np.ceil(b)) + margin + 1))
        for a, b, margin, side in zip(low, high, margins, shape, strict=True)
    ]
    return box, bool((low >= 0).all() and (high <= np.asarray(shape) - 1).all())


def _places(
    matrix: np.ndarray,
    block: list[tuple[int, int]],
    box: list[tuple[int, int]],
    shape: Sequence[int],
    like: Tensor,
    repeat: int | None,
) -> tuple[Tensor, Callable[[], Tensor]]:
    """Returns where the voxels of a block lie in a box of the source, in the units of `grid_sample`.

    Args:
        matrix, block, shape, repeat: As for `_box_read`.
        box: First and last + 1 source voxel along each axis.
        like: Type and device of the result.

    Returns:
        (I, J, K, 3), and a function that says which lie more than half a voxel outside of the source, (I, J, K).
    """
    sides, firsts = (np.array(values, dtype=float) for values in zip(*((b - a, a) for a, b in box), strict=True))
    # With align_corners=False, −1 and 1 are the outer faces of the array; the last axis comes first.
    start = (2 * (matrix[:3, 3] - firsts) + 1) / sides - 1
    along = [np.arange(a, b)[:, None] * (2 * matrix[:3, axis] / sides) for axis, (a, b) in enumerate(block)]
    along[0] = along[0] + start
    i, j, k = (torch.from_numpy(np.ascontiguousarray(at[:, ::-1])).to(like) for at in along)
    unit_IJK3 = (i[:, None] + j)[:, :, None] + k

    def outside() -> Tensor:
        faces = torch.from_numpy(np.stack([-2 * firsts, 2 * (np.asarray(shape) - firsts)]) / sides - 1).to(like).flip(1)
        beyond = (unit_IJK3 < faces[0]) | (unit_IJK3 > faces[1])
        if repeat is not None:
            beyond[..., 2 - repeat] = False
        return beyond.any(-1)

    return unit_IJK3, outside


def _sigma(factor: float) -> float:
    """Returns the standard deviation, in voxels, of the Gaussian for voxels that become `factor` times larger."""
    return ((factor**2 - 1) / 12) ** 0.5


def _reach(factor: float) -> int:
    """Returns the number of voxels on either side that the smoothing reads."""
    return max(1, int(np.ceil(3 * _sigma(factor))))


def _gaussian(factor: float) -> Tensor:
    """Returns the weights of the smoothing, float64; their sum is 1."""
    sigma, reach = _sigma(factor), _reach(factor)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma) ** 2)
    return kernel / kernel.sum()


def _smooth(x: Tensor, axis: int, factor: float) -> Tensor:
    """Smooths along one axis with a Gaussian of variance (factor² − 1) / 12.

    This is the variance of a box of `factor` voxels minus the variance of a box of one voxel.
    """
    size, kernel, reach = x.shape[axis], _gaussian(factor).numpy(), _reach(factor)
    rows, weights = np.arange(size), np.zeros((size, size))
    for offset, weight in zip(range(-reach, reach + 1), kernel, strict=True):
        # Beyond the border, the border value is repeated.
        weights[rows, np.clip(rows + offset, 0, size - 1)] += weight
    return _multiplied(x, torch.from_numpy(weights).to(device=x.device, dtype=x.dtype), axis)
