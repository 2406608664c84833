"""Resamples finished planes of the network grid to planes of the scan's own grid as soon as that is possible."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mome.volumes import Grid, resample

# The logit outside the network grid: low enough to stay background after interpolation.
OUTSIDE_LOGIT = -30.0
_PLANES_PER_BLOCK = 16


class PlaneStream:
    """Takes planes of the network grid in order and returns blocks of planes of the scan's grid.

    The scan's grid is cut along the axis that is closest to the network's first axis. A plane of it is computed once
    all network planes that it reads have arrived, and network planes that no later plane reads are dropped. For an
    oblique scan more planes are kept; the results are the same.

    Args:
        network: The grid of the logits.
        output: The scan's grid.

    Attributes:
        axis: The axis of `output` along which its planes are cut.
        most_planes: The largest number of network planes that were held at once.
    """

    def __init__(self, network: Grid, output: Grid) -> None:
        self.network, self.output = network, output
        output_to_network = np.linalg.inv(network.affine) @ output.affine
        self.axis = int(np.argmax(np.abs(output_to_network[0, :3])))
        ascending = output_to_network[0, self.axis] >= 0
        count = output.shape[self.axis]
        self._order = list(range(count)) if ascending else list(reversed(range(count)))
        low, high = self._planes_read(output_to_network)
        low, self._high = low[self._order], high[self._order]
        # the lowest network plane that each plane or a later one reads
        self._needed_from = np.minimum.accumulate(low[::-1])[::-1]
        self._next = 0
        self._held: Tensor | None = None
        self._first_held = 0
        self.most_planes = 0

    def _planes_read(self, output_to_network: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lowest and the highest network plane that each output plane reads."""
        first_row = output_to_network[0]
        planes = np.arange(self.output.shape[self.axis])
        centre = first_row[3] + first_row[self.axis] * planes
        low, high = centre.copy(), centre.copy()
        for other in {0, 1, 2} - {self.axis}:
            span = first_row[other] * (self.output.shape[other] - 1)
            low, high = low + min(span, 0), high + max(span, 0)
        last = self.network.shape[0] - 1
        # Rounded headers move a voxel by about a thousandth, so the range is a hundredth of a voxel wider.
        low = np.clip(np.floor(low - 1e-2), 0, last).astype(int)
        high = np.clip(np.ceil(high + 1e-2), 0, last).astype(int)
        return low, high

    def push(self, first: int, logits: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """Takes the next network planes and yields the output planes that are now complete.

        Args:
            first: The index of the first of these network planes.
            logits: (P, n, H, W).

        Yields:
            The indices of the output planes, and their logits (P, i, j, k) with these planes along `axis`.
        """
        self._held = logits if self._held is None else torch.cat([self._held, logits], dim=1)
        end = first + logits.shape[1]
        self.most_planes = max(self.most_planes, self._held.shape[1])
        ready = self._next
        while ready < len(self._order) and self._high[ready] < end:
            ready += 1
        if ready > self._next:
            source = self.network.crop(0, self._first_held, end)
            for start in range(self._next, ready, _PLANES_PER_BLOCK):
                chosen = self._order[start : min(start + _PLANES_PER_BLOCK, ready)]
                low, high = min(chosen), max(chosen) + 1
                target = self.output.crop(self.axis, low, high)
                block = resample(self._held, source, target, fill=OUTSIDE_LOGIT, antialias=False)
                yield list(range(low, high)), block
            self._next = ready
        keep_from = int(self._needed_from[self._next]) if self._next < len(self._order) else end
        drop = min(max(0, keep_from - self._first_held), self._held.shape[1])
        self._held, self._first_held = self._held[:, drop:], self._first_held + drop
