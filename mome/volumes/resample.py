"""Resampling by affine in torch, in slabs: from any grid to any other, on CPU and GPU alike.

Going back to a scan's own grid is this same function with the grids exchanged; no flip is ever undone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mome.volumes.grid import Grid

# Coordinates of one slab: 3 float32 numbers for each of its voxels.
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
    """The values of `array` at the voxel centres of `target`.

    Args:
        array: (i, j, k) or (channels, i, j, k) on `source`; anything but float64 is read as float32.
        source, target: Either may be a block of planes of a larger grid (`Grid.crop`).
        mode: `linear` (trilinear) or `nearest`.
        fill: Value outside `source`. Within half a voxel of its outer centres the border's value holds.
        antialias: Smooth first along axes that become coarser by more than 1.2 (Gaussian whose variance is what
            separates the two voxel sizes; our choice).

    Returns:
        (…, *target.shape) float32, on the array's device.
    """
    # torch has no negative strides, which a flipped view has
    x = torch.as_tensor(np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array)
    x = x if x.dtype == torch.float64 else x.float()
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode is 'linear' or 'nearest', not {mode!r}")
    single = x.ndim == 3
    x = x[None] if single else x
    move = np.linalg.inv(source.affine) @ target.affine  # target voxel → source voxel
    order = _axis_order(move)
    if order is None:
        out = _oblique(x, source, target, move, mode, fill, antialias)
    else:
        out = _separable(x, source, target, move, order, mode, fill, antialias)
    return out[0] if single else out


def _axis_order(move: np.ndarray) -> list[int] | None:
    """For every target axis, the source axis it runs along; None where the grids are oblique to each other."""
    order = [int(np.argmax(np.abs(move[:3, axis]))) for axis in range(3)]
    rest = np.abs(move[:3, :3]).copy()
    for axis, source_axis in enumerate(order):
        rest[source_axis, axis] = 0
    # 1e-5 of a voxel per voxel is what float32 headers leave
    return order if sorted(order) == [0, 1, 2] and rest.max() < 1e-5 else None


def _separable(
    x: Tensor,
    source: Grid,
    target: Grid,
    move: np.ndarray,
    order: list[int],
    mode: str,
    fill: float,
    antialias: bool,
) -> Tensor:
    """One axis at a time, slab by slab along the first target axis; exact copies where voxels coincide."""
    x = x.permute(0, *(1 + axis for axis in order))
    places, outside, blurs = [], [], []
    for axis, source_axis in enumerate(order):
        step, size = move[source_axis, axis], source.shape[source_axis]
        at = move[source_axis, 3] + step * np.arange(target.shape[axis])
        # rounded headers must not turn an exact copy into an interpolation
        near = np.abs(at - np.round(at)) < 1e-3
        at = np.where(near, np.round(at), at)
        outside.append(torch.as_tensor((at < -0.5) | (at > size - 0.5), device=x.device))
        places.append(np.clip(at, 0, size - 1))
        blurs.append(abs(step) if antialias and mode == "linear" and abs(step) > 1.2 else None)
    # a slab's voxels are counted where it is largest: as planes of the target or as those of the source it reads
    read = int(np.ceil(abs(move[order[0], 0]))) * x.shape[2] * x.shape[3]
    per_slab = max(1, _SLAB_VOXELS // max(1, target.shape[1] * target.shape[2], read))
    margin = 1 if blurs[0] is None else 1 + _reach(blurs[0])
    out = x.new_empty(x.shape[0], *target.shape)
    for start in range(0, target.shape[0], per_slab):
        planes = slice(start, start + per_slab)
        at = places[0][planes]
        first = max(0, int(np.floor(at.min())) - margin)
        slab = x[:, first : int(np.floor(at.max())) + margin + 1]
        for axis, where in enumerate((at - first, places[1], places[2])):
            slab = _along(slab, axis + 1, where, mode, blurs[axis])
        missing = outside[0][planes, None, None] | outside[1][None, :, None] | outside[2][None, None, :]
        out[:, planes] = slab.masked_fill(missing, fill)
    return out


def _along(x: Tensor, axis: int, at: np.ndarray, mode: str, blur: float | None) -> Tensor:
    """The values at the places `at` (in voxels, inside the array) of one axis, smoothed for steps of `blur` first."""
    if blur is not None:
        x = _smooth(x, axis, blur)
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
    share = torch.as_tensor(weight, dtype=x.dtype, device=x.device).reshape(shape)
    return torch.lerp(lower, x.index_select(axis, high), share)


def _oblique(
    x: Tensor, source: Grid, target: Grid, move: np.ndarray, mode: str, fill: float, antialias: bool
) -> Tensor:
    """`grid_sample`, slab by slab along the first target axis."""
    if antialias and mode == "linear":
        for axis in range(3):
            # how far a step of one target voxel, along whichever target axis, goes on this source axis
            step = float(np.abs(move[axis, :3]).max())
            if step > 1.2:
                x = _smooth(x, axis + 1, step)
    size = torch.tensor(source.shape, dtype=torch.float64)
    matrix = torch.from_numpy(move[:3, :3])
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
            + torch.from_numpy(move[:3, 3])
        )  # (planes, rows, columns, 3) in source voxels
        outside = ((at < -0.5) | (at > size - 0.5)).any(-1).to(x.device)
        # align_corners=False: −1 and 1 are the outer faces of the array; the last axis comes first
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
    return ((factor**2 - 1) / 12) ** 0.5


def _reach(factor: float) -> int:
    """Voxels to either side that the smoothing reads."""
    return max(1, int(np.ceil(3 * _sigma(factor))))


def _smooth(x: Tensor, axis: int, factor: float) -> Tensor:
    """Gaussian along one axis: the variance of a box of `factor` voxels less that of one voxel."""
    sigma, reach = _sigma(factor), _reach(factor)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    moved = x.movedim(axis, -1)
    flat = F.pad(moved.reshape(-1, 1, moved.shape[-1]), (reach, reach), mode="replicate")
    return F.conv1d(flat, kernel.reshape(1, 1, -1)).reshape(moved.shape).movedim(-1, axis)
