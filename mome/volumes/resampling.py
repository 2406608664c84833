"""Resampling by affine in torch, slab by slab, from any grid to any other, on the CPU or a GPU.

The way back to a scan's own grid is the same function with the grids exchanged; there is no code that undoes flips.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mome.volumes.axis_sampling import AxisSampling, parallel_axes
from mome.volumes.grid import Grid

# Most voxels of one slab; each needs three float32 coordinates.
_SLAB_VOXELS = 4_000_000


def resample(
    array: Tensor | np.ndarray,
    source: Grid,
    target: Grid,
    *,
    mode: str = "linear",
    fill: float = 0.0,
    antialias: bool = True,
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
        out = _oblique(x, source, target, mode, fill, antialias)
    else:
        out = _separable(x, target, samplings, mode, fill, antialias)
    return out[0] if single else out


def _separable(
    x: Tensor, target: Grid, samplings: list[AxisSampling], mode: str, fill: float, antialias: bool
) -> Tensor:
    """Resamples one axis at a time, slab by slab along the first target axis; where voxels coincide, it copies."""
    x = x.permute(0, *(1 + sampling.source_axis for sampling in samplings))
    positions = [sampling.at for sampling in samplings]
    outside = [torch.as_tensor(sampling.outside, device=x.device) for sampling in samplings]
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


def _oblique(x: Tensor, source: Grid, target: Grid, mode: str, fill: float, antialias: bool) -> Tensor:
    """Resamples with `grid_sample`, slab by slab along the first target axis."""
    target_to_source = np.linalg.inv(source.affine) @ target.affine
    if antialias and mode == "linear":
        for axis in range(3):
            # the longest step on this source axis that one target voxel makes, along any target axis
            step = float(np.abs(target_to_source[axis, :3]).max())
            if step > 1.2:
                x = _smooth(x, axis + 1, step)
    size = torch.tensor(source.shape, dtype=torch.float64)
    matrix = torch.from_numpy(target_to_source[:3, :3])
    rows = torch.arange(target.shape[1], dtype=torch.float64)
    columns = torch.arange(target.shape[2], dtype=torch.float64)
    per_slab = max(1, _SLAB_VOXELS // max(1, target.shape[1] * target.shape[2]))
    slabs = []
    for start in range(0, target.shape[0], per_slab):
        planes = torch.arange(start, min(start + per_slab, target.shape[0]), dtype=torch.float64)
        at = (
            planes[:, None, None, None] * matrix[:, 0]
            + rows[None, :, None, None] * matrix[:, 1]
            + columns[None, None, :, None] * matrix[:, 2]
            + torch.from_numpy(target_to_source[:3, 3])
        )  # (planes, rows, columns, 3) in source voxels
        outside = ((at < -0.5) | (at > size - 0.5)).any(-1).to(x.device)
        # With align_corners=False, −1 and 1 are the outer faces of the array; the last axis comes first.
        unit = (((2 * at + 1) / size) - 1).flip(-1).to(device=x.device, dtype=x.dtype)
        slab = F.grid_sample(
            x[None],
            unit[None],
            mode="bilinear" if mode == "linear" else "nearest",
            padding_mode="border",
            align_corners=False,
        )[0]
        slabs.append(slab.masked_fill_(outside, fill))
    return torch.cat(slabs, dim=1)


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
    kernel, reach = _gaussian(factor).to(device=x.device, dtype=x.dtype), _reach(factor)
    moved = x.movedim(axis, -1)
    flat = F.pad(moved.reshape(-1, 1, moved.shape[-1]), (reach, reach), mode="replicate")
    return F.conv1d(flat, kernel.reshape(1, 1, -1)).reshape(moved.shape).movedim(-1, axis)
