"""Sums of weighted logits of the planes that tiles still change: a ring of as many planes as a tile has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# The logit outside of the network grid and where no tile was computed. It is low enough to stay background after
# interpolation.
OUTSIDE_LOGIT = -30.0


class LogitRing:
    """Adds tiles in place. Plane i of the volume lies in row i modulo the length of the ring, so nothing is moved.

    Args:
        prompts: Number of prompts P.
        size: Voxels (D, H, W) of the volume, at least those of a tile.
        length: Planes of the ring: those of a tile.
        axis: The axis of the volume that the planes are counted along.
        device: Where the sums are kept.
        dtype: Type of the sums of logits; sums of weights are float32.
    """

    def __init__(
        self,
        prompts: int,
        size: Sequence[int],
        length: int,
        axis: int,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.axis, self.length, self.prompts = axis, length, prompts
        shape = list(size)
        shape[axis] = length
        self._sums = _zeros([prompts, *shape], device, dtype)
        self._weights = torch.zeros(shape, device=device)

    def add(self, prompts: slice, corner: Sequence[int], logits_PDHW: Tensor, window: Tensor) -> None:
        """Adds the logits of a tile, times the window, to the sums of some prompts.

        Args:
            prompts: The prompts.
            corner: The tile's first voxel (d, h, w).
            logits_PDHW: The logits of these prompts.
            window: (D, H, W), the weights of the tile's voxels.
        """
        for inside, planes in self._rows(corner[self.axis], corner[self.axis] + self.length):
            place = self._place(corner, window.shape, inside)
            values, weights = logits_PDHW.narrow(1 + self.axis, *planes), window.narrow(self.axis, *planes)
            target = self._sums[prompts][(slice(None), *place)]
            # A sum is rounded once; adding float32 to sums in float16 would take twice the time.
            target.addcmul_(values.to(target.dtype), weights.to(target.dtype))

    def add_weight(self, corner: Sequence[int], window: Tensor) -> None:
        """Adds the window to the sums of weights, once per tile."""
        window = window.to(self._sums.dtype)  # as logits are weighted by it
        for inside, planes in self._rows(corner[self.axis], corner[self.axis] + self.length):
            self._weights[self._place(corner, window.shape, inside)] += window.narrow(self.axis, *planes)

    def clear(self, start: int, stop: int) -> None:
        """Sets the planes `start` to `stop` − 1 to zero, for the planes that take their rows."""
        for inside, _ in self._rows(start, stop):
            self._sums.narrow(1 + self.axis, inside.start, inside.stop - inside.start).zero_()
            self._weights.narrow(self.axis, inside.start, inside.stop - inside.start).zero_()

    def mean(self, prompts: slice, start: int, stop: int, size: Sequence[int]) -> Tensor:
        """Returns the mean logits (P, …) of some prompts, float32, with the planes `start` to `stop` − 1 along `axis`.

        Args:
            prompts: The prompts.
            start: The first plane.
            stop: The last plane + 1.
            size: Voxels (D, H, W) of the volume; padding beyond them is left out.
        """
        shape = list(size)
        shape[self.axis] = stop - start
        count = len(range(*prompts.indices(self.prompts)))
        out = torch.empty(count, *shape, device=self._sums.device)
        kept = tuple(slice(None) if axis == self.axis else slice(0, side) for axis, side in enumerate(size))
        for inside, planes in self._rows(start, stop):
            rows = (*kept[: self.axis], inside, *kept[self.axis + 1 :])
            weights, target = self._weights[rows], out.narrow(1 + self.axis, *planes)
            # Dividing float16 by float32 directly would take longer.
            target.copy_(self._sums[prompts][(slice(None), *rows)]).div_(weights)
            uncovered = weights == 0
            if uncovered.any():
                target.masked_fill_(uncovered, OUTSIDE_LOGIT)
        return out

    def _rows(self, start: int, stop: int) -> Iterator[tuple[slice, tuple[int, int]]]:
        """Yields the rows of the ring that hold the planes, in one or two pieces, with (offset, length) among them."""
        at = start
        while at < stop:
            row = at % self.length
            count = min(stop - at, self.length - row)
            yield slice(row, row + count), (at - start, count)
            at += count

    def _place(self, corner: Sequence[int], patch: Sequence[int], rows: slice) -> tuple[slice, ...]:
        place = [slice(first, first + side) for first, side in zip(corner, patch, strict=True)]
        place[self.axis] = rows
        return tuple(place)


def _zeros(shape: list[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns zeros. On the CPU, NumPy asks the system for empty pages, so that no pass writes zeros into them."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    return torch.from_numpy(np.zeros(shape, dtype=torch.empty(0, dtype=dtype).numpy().dtype))


class FinishedPlanes:
    """Planes that no later tile changes. They can be read until the stream goes on.

    Attributes:
        first: The first plane.
        stop: The last plane + 1.
    """

    def __init__(self, ring: LogitRing, first: int, stop: int, size: Sequence[int]) -> None:
        self._ring, self.first, self.stop, self._size = ring, first, stop, size

    def logits(self, prompts: slice) -> Tensor:
        """Returns the float32 logits (P, …) of some prompts, with the planes along the axis of the stream."""
        return self._ring.mean(prompts, self.first, self.stop, self._size)
