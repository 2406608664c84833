"""Finds the planes of the scan's own grid that can be computed as soon as planes of the network grid arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mome.inference.between_planes import BetweenPlanes
from mome.volumes import Grid
from mome.volumes.axis_sampling import parallel_axes


@dataclass(frozen=True)
class ReadyPlanes:
    """Planes of the scan's grid that can be computed now, and the logits that they read.

    Attributes:
        planes: Their indices along `PlaneStream.axis`.
        logits: (P, D, H, W) on `source`.
        source: A block of planes of the network grid.
        target: The grid of these planes.
        between: Where `source` and `target` are oblique to each other, the voxels of `target` that belong to this
            piece. None for all.
    """

    planes: range
    logits: Tensor
    source: Grid
    target: Grid
    between: BetweenPlanes | None = None


class PlaneStream:
    """Takes planes of the network grid in order and returns planes of the scan's grid with what they read.

    The scan's grid is cut along the axis that is closest to the network's axis. A plane of it is ready once all network
    planes that it reads have arrived, and network planes that no later plane reads are dropped. Where the grids are
    oblique to each other, `SlantedStream` holds fewer planes.

    Args:
        network: The grid of the logits.
        output: The scan's grid.
        network_axis: The axis of `network` along which planes arrive.

    Attributes:
        axis: The axis of `output` along which its planes are cut.
        most_planes: The largest number of network planes that were held at once.
    """

    def __init__(self, network: Grid, output: Grid, network_axis: int = 0) -> None:
        self.network, self.output, self._network_axis = network, output, network_axis
        row = (np.linalg.inv(network.affine) @ output.affine)[network_axis]
        self.axis = int(np.argmax(np.abs(row[:3])))
        self._is_ascending = bool(row[self.axis] >= 0)
        low, high = self._planes_read(row)
        if not self._is_ascending:
            low, high = low[::-1], high[::-1]
        self._high = high
        # the lowest network plane that each plane or a later one reads
        self._needed_from = np.minimum.accumulate(low[::-1])[::-1]
        self._next = 0
        self._held: Tensor | None = None
        self._first_held = 0
        self.most_planes = 0

    def _planes_read(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lowest and the highest network plane that each output plane reads.

        Args:
            row: (4,), the network plane as a linear function of the output voxel.
        """
        centre = row[3] + row[self.axis] * np.arange(self.output.shape[self.axis])
        low, high = centre.copy(), centre.copy()
        for other in {0, 1, 2} - {self.axis}:
            span = row[other] * (self.output.shape[other] - 1)
            low, high = low + min(span, 0), high + max(span, 0)
        last = self.network.shape[self._network_axis] - 1
        # Rounded headers move a voxel by about a thousandth, so the range is a hundredth of a voxel wider.
        low = np.clip(np.floor(low - 1e-2), 0, last).astype(int)
        high = np.clip(np.ceil(high + 1e-2), 0, last).astype(int)
        return low, high

    def push(self, first: int, logits: Tensor) -> ReadyPlanes | None:
        """Takes the next network planes and returns the output planes that are now complete, None where none is.

        Args:
            first: The index of the first of these network planes.
            logits: (P, D, H, W), with these planes along the network axis.
        """
        dim = 1 + self._network_axis
        held = logits if self._held is None or not self._held.shape[dim] else torch.cat([self._held, logits], dim=dim)
        if self._held is None:
            self._first_held = first
        end = first + logits.shape[dim]
        self.most_planes = max(self.most_planes, held.shape[dim])
        ready = self._next
        while ready < len(self._high) and self._high[ready] < end:
            ready += 1
        result = self._ready(ready, held, end) if ready > self._next else None
        self._next = ready
        keep_from = int(self._needed_from[ready]) if ready < len(self._high) else end
        drop = min(max(0, keep_from - self._first_held), held.shape[dim])
        # A copy, so that the planes that are dropped do not stay in memory.
        self._held, self._first_held = held.narrow(dim, drop, held.shape[dim] - drop).clone(), self._first_held + drop
        return result

    def _ready(self, ready: int, held: Tensor, end: int) -> ReadyPlanes:
        """Returns the output planes from the next one to number `ready` − 1 in the order of the network's planes."""
        count = self.output.shape[self.axis]
        planes = range(self._next, ready) if self._is_ascending else range(count - ready, count - self._next)
        lowest = int(self._needed_from[self._next])
        used = held.narrow(1 + self._network_axis, lowest - self._first_held, end - lowest)
        source = self.network.crop(self._network_axis, lowest, end)
        return ReadyPlanes(planes, used, source, self.output.crop(self.axis, planes.start, planes.stop))


class SlantedStream:
    """Takes planes of a network grid that is oblique to the scan's grid, and returns the voxels between them.

    A voxel of the scan is interpolated as soon as both network planes around it have arrived. The voxels between
    network planes lie on slanted planes of the scan, so `target` is the whole scan's grid, and `between` says which of
    its voxels belong to the planes that arrived. One network plane is held.

    Args:
        network: The grid of the logits.
        output: The scan's grid.
        network_axis: The axis of `network` along which planes arrive.

    Attributes:
        axis: The axis of `output` that is closest to the network axis.
    """

    def __init__(self, network: Grid, output: Grid, network_axis: int = 0) -> None:
        self.network, self.output, self._network_axis = network, output, network_axis
        self._row = (np.linalg.inv(network.affine) @ output.affine)[network_axis]
        self.axis = int(np.argmax(np.abs(self._row[:3])))
        self._held: Tensor | None = None

    def push(self, first: int, logits: Tensor) -> ReadyPlanes:
        """Takes the next network planes and returns the logits of all voxels between them; see `PlaneStream.push`."""
        dim, start = 1 + self._network_axis, first
        stop = first + logits.shape[dim]
        if self._held is not None:
            logits, start = torch.cat([self._held, logits], dim=dim), first - 1
        is_last = stop == self.network.shape[self._network_axis]
        low, high = -np.inf if self._held is None else float(start), np.inf if is_last else stop - 1.0
        self._held = logits.narrow(dim, logits.shape[dim] - 1, 1).clone()
        source = self.network.crop(self._network_axis, start, stop)
        between = BetweenPlanes(self._row, low, high)
        return ReadyPlanes(range(self.output.shape[self.axis]), logits, source, self.output, between)


def plane_stream(network: Grid, output: Grid, network_axis: int) -> PlaneStream | SlantedStream:
    """Returns the stream for two grids: `SlantedStream` where they are oblique to each other."""
    is_parallel = parallel_axes(network, output) is not None
    return (PlaneStream if is_parallel else SlantedStream)(network, output, network_axis)


def shortest_buffer_axis(size: Sequence[int], patch: Sequence[int]) -> int:
    """Returns the axis of a volume along which the buffer of a tile's planes is smallest.

    Args:
        size: Voxels (D, H, W) of the network grid.
        patch: Voxels (D, H, W) of a tile.
    """
    padded = [max(side, p) for side, p in zip(size, patch, strict=True)]
    # Where two are equal, the last axis is taken, which most scans store their slices along.
    return min((2, 1, 0), key=lambda axis: patch[axis] / padded[axis])
