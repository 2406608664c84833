"""Interpolates logits only where they can be above a threshold, which gives the same voxels as interpolating all.

A trilinear value is a weighted mean of eight neighbours, so it is above a threshold only where one of them is. What
lies outside of the box of such neighbours is background and is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from mome.inference.between_planes import BetweenPlanes
from mome.inference.logit_ring import OUTSIDE_LOGIT
from mome.volumes import Grid, resample
from mome.volumes.axis_sampling import parallel_axes
from mome.volumes.resampling import blocks

# Voxels that are interpolated at once. On the CPU they fit into its cache; our choice.
_CPU_VOXELS, _GPU_VOXELS = 1 << 16, 1 << 26
# Voxels along the side of a block of the target, where grids are oblique to each other.
_OBLIQUE_SIDE = 48
# Network planes whose rows and columns are interpolated at once, so that this buffer stays small. A GPU waits for the
# CPU at every block, so it gets all planes of a tile.
_CPU_PLANES, _GPU_PLANES = 8, 256

Range = tuple[int, int]
Convert = Callable[[Tensor], Tensor]
Block = tuple[tuple[int, int, int], np.ndarray]


class AboveThreshold:
    """Interpolates from a block of the network grid to one of the scan's grid, where values can be above a threshold.

    Args:
        source: The grid of the logits.
        target: The grid of the result.
        axis: The axis of `target` whose planes are computed one after the other; it is the slowest axis of results.
        threshold: The logit that matters.
        part: For grids that are oblique to each other: the target voxels that are computed; what lies elsewhere is 0.
            None for all.
    """

    def __init__(
        self,
        source: Grid,
        target: Grid,
        axis: int,
        threshold: float = 0.0,
        part: BetweenPlanes | None = None,
    ) -> None:
        self.source, self.target, self.threshold, self.part = source, target, threshold, part
        # planes, rows, columns: the axis of the lowest index is the fastest, as in files of masks
        self.order = (axis, *sorted({0, 1, 2} - {axis}, reverse=True))
        self._samplings = parallel_axes(source, target)

    def blocks(self, logits_DHW: Tensor, convert: Convert) -> Iterator[Block]:
        """Yields (first voxel, values) of blocks of the target that hold all voxels above the threshold.

        Args:
            logits_DHW: Finite float32 logits of one prompt on `source`.
            convert: Turns interpolated logits into what is kept, as bool or uint8; it sees some planes at a time.

        Yields:
            The first voxel (i, j, k) in `target`, and values (i, j, k), of which axis `axis` is the slowest in memory.
        """
        box = box_above(logits_DHW, self.threshold)
        if box is None:
            return
        if self._samplings is None:
            yield from self._oblique(logits_DHW, box, convert)
        else:
            yield from self._parallel(logits_DHW, box, convert)

    def _parallel(self, logits_DHW: Tensor, box: list[Range], convert: Convert) -> Iterator[Block]:
        """Interpolates columns, then rows, then planes: the last step, which is the largest, reads whole planes."""
        assert self._samplings is not None
        samplings = [self._samplings[axis] for axis in self.order]
        ranges = []
        for sampling in samplings:
            first, last = box[sampling.source_axis]
            touched = ~sampling.outside & (sampling.low < last) & (sampling.high >= first)
            places = np.flatnonzero(touched)
            if not places.size:
                return
            ranges.append((int(places[0]), int(places[-1]) + 1))
        lows = [sampling.low[a:b] for sampling, (a, b) in zip(samplings, ranges, strict=True)]
        highs = [sampling.high[a:b] for sampling, (a, b) in zip(samplings, ranges, strict=True)]
        weights = [sampling.weight[a:b] for sampling, (a, b) in zip(samplings, ranges, strict=True)]
        x = logits_DHW.permute(*(sampling.source_axis for sampling in samplings))
        for dim in (1, 2):
            first = int(lows[dim].min())
            x = x.narrow(dim, first, int(highs[dim].max()) + 1 - first)
            lows[dim], highs[dim] = lows[dim] - first, highs[dim] - first
        first_voxel = [0, 0, 0]
        for axis, (start, _) in zip(self.order, ranges, strict=True):
            first_voxel[axis] = start
        most = _CPU_PLANES if x.device.type == "cpu" else _GPU_PLANES
        for at, stop in _pieces(lows[0], highs[0], most):
            low, high = lows[0][at:stop], highs[0][at:stop]
            start = int(min(low.min(), high.min()))
            planes = x.narrow(0, start, int(max(low.max(), high.max())) + 1 - start)
            planes = _lerp(_lerp(planes, 2, lows[2], highs[2], weights[2]), 1, lows[1], highs[1], weights[1])
            step = self._planes_at_once(planes.shape[1] * planes.shape[2], planes.device)
            if step == 1:
                pairs = zip(low - start, high - start, weights[0][at:stop].tolist(), strict=True)
                parts = [convert(_between(planes, int(a), int(b), share)) for a, b, share in pairs]
            else:
                pieces = [slice(first, min(first + step, stop)) for first in range(at, stop, step)]
                parts = [
                    convert(_lerp(planes, 0, lows[0][piece] - start, highs[0][piece] - start, weights[0][piece]))
                    for piece in pieces
                ]
            corner = list(first_voxel)
            corner[self.order[0]] += at
            yield (corner[0], corner[1], corner[2]), self._on_axes(parts)

    def _oblique(self, logits_DHW: Tensor, box: list[Range], convert: Convert) -> Iterator[Block]:
        """Resamples the part of the target that the box, wider by one voxel, may reach."""
        sizes = logits_DHW.shape
        wide = [(max(0, a - 1), min(side, b + 1)) for (a, b), side in zip(box, sizes, strict=True)]
        source_to_target = np.linalg.inv(self.target.affine) @ self.source.affine
        # the outer faces: the border value reaches half a voxel beyond the outer voxel centres
        corners = np.array([[*corner, 1.0] for corner in product(*((a - 0.5, b - 0.5) for a, b in wide))])
        places = (corners @ source_to_target.T)[:, :3]
        reach = [
            (max(0, int(np.floor(places[:, axis].min()))), min(side, int(np.ceil(places[:, axis].max())) + 1))
            for axis, side in enumerate(self.target.shape)
        ]
        if any(a >= b for a, b in reach):
            return
        target = self.target
        for axis in range(3):
            target = target.crop(axis, *reach[axis])
        for block in blocks(target.shape, _OBLIQUE_SIDE):
            first = [a + start for (a, _), (start, _) in zip(reach, block, strict=True)]
            part = target
            for axis in range(3):
                part = part.crop(axis, *block[axis])
            if self.part is not None and self.part.misses(first, part.shape):
                continue
            read = self._box_read(part, sizes)
            if read is None or not (logits_DHW[tuple(slice(a, b) for a, b in read)] > self.threshold).any():
                continue
            source = self.source
            for axis in range(3):
                source = source.crop(axis, *read[axis])
            x = logits_DHW[tuple(slice(a, b) for a, b in read)]
            values = convert(resample(x, source, part, fill=OUTSIDE_LOGIT, antialias=False))
            if self.part is not None:
                values = values.mul_(self.part.contains(first, part.shape).to(values))
            yield (first[0], first[1], first[2]), self._on_axes([values.permute(*self.order).contiguous()])

    def _box_read(self, target: Grid, sizes: Sequence[int]) -> list[Range] | None:
        """Returns the box of the source that a block of the target reads, None where it reads nothing."""
        target_to_source = np.linalg.inv(self.source.affine) @ target.affine
        corners = np.array([[*corner, 1.0] for corner in product(*((0, side - 1) for side in target.shape))])
        places = (corners @ target_to_source.T)[:, :3]
        low, high = places.min(axis=0), places.max(axis=0)
        box = [
            (max(0, int(np.floor(a)) - 1), min(side, int(np.ceil(b)) + 2))
            for a, b, side in zip(low, high, sizes, strict=True)
        ]
        return None if any(a >= b for a, b in box) else box

    def _planes_at_once(self, voxels: int, device: torch.device) -> int:
        return max(1, (_CPU_VOXELS if device.type == "cpu" else _GPU_VOXELS) // max(1, voxels))

    def _on_axes(self, parts: list[Tensor]) -> np.ndarray:
        """Returns blocks of planes as one array with the axes in the order of the target."""
        values = (parts[0] if len(parts) == 1 else torch.cat(parts)).cpu().numpy()
        return values.transpose([self.order.index(axis) for axis in range(3)])


def box_above(logits_DHW: Tensor, threshold: float) -> list[Range] | None:
    """Returns the box of values above a threshold, first and last + 1 along each axis; None where none is."""
    over_DH = logits_DHW.amax(dim=2) > threshold
    if not over_DH.any():
        return None
    profiles = [over_DH.any(dim=1), over_DH.any(dim=0)]
    rows = [torch.nonzero(profile).flatten() for profile in profiles]
    first, last = int(rows[0][0]), int(rows[0][-1]) + 1
    over_W = (logits_DHW[first:last].amax(dim=0).amax(dim=0)) > threshold
    rows.append(torch.nonzero(over_W).flatten())
    return [(int(row[0]), int(row[-1]) + 1) for row in rows]


def _lerp(x: Tensor, dim: int, low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> Tensor:
    """Interpolates along one axis; see `AxisSampling` for the three arrays."""
    lower = x.index_select(dim, torch.from_numpy(low).to(x.device))
    if not (weight > 0).any():
        return lower
    shape = [1, 1, 1]
    shape[dim] = -1
    fraction = torch.as_tensor(weight, dtype=x.dtype, device=x.device).reshape(shape)
    return torch.lerp(lower, x.index_select(dim, torch.from_numpy(high).to(x.device)), fraction)


def _between(planes: Tensor, low: int, high: int, weight: float) -> Tensor:
    """Interpolates between two planes, which are not copied: (1, rows, columns)."""
    lower = planes[low : low + 1]
    return torch.lerp(lower, planes[high : high + 1], weight) if weight > 0 else lower


def _pieces(low: np.ndarray, high: np.ndarray, most: int) -> Iterator[Range]:
    """Yields runs of positions that read at most about `most` source planes each, first and last + 1."""
    at = 0
    while at < len(low):
        lowest = np.minimum.accumulate(np.minimum(low[at:], high[at:]))
        highest = np.maximum.accumulate(np.maximum(low[at:], high[at:]))
        fits = np.flatnonzero(highest - lowest < most)
        stop = at + max(1, int(fits[-1]) + 1)
        yield at, stop
        at = stop
