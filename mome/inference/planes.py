"""From finished planes of the network grid to planes of the scan's own grid, as soon as they can be made."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mome.volumes import Grid, resample

# A logit that is background whatever is added to it.
OUTSIDE = -30.0


class PlaneStream:
    """Takes network planes in order, gives back blocks of output planes.

    The output is cut along the axis that runs most nearly with the network's first axis. A plane of it is made
    when every network plane it reads is there; network planes that no later output plane reads are dropped.
    Oblique scans keep more planes; nothing else changes.

    Args:
        network: Grid of the logits.
        output: Grid of the scan.
    """

    def __init__(self, network: Grid, output: Grid) -> None:
        self.network, self.output = network, output
        move = np.linalg.inv(network.affine) @ output.affine  # output voxel → network voxel
        self.axis = int(np.argmax(np.abs(move[0, :3])))
        ascending = move[0, self.axis] >= 0
        count = output.shape[self.axis]
        self.order = list(range(count)) if ascending else list(reversed(range(count)))
        low, high = self._reach(move)
        self.low, self.high = low[self.order], high[self.order]
        # what the planes from here on still read
        self.needed_from = np.minimum.accumulate(self.low[::-1])[::-1]
        self.next = 0
        self.held: Tensor | None = None
        self.first = 0
        self.most_planes = 0

    def _reach(self, move: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest network plane that each output plane reads."""
        planes = np.arange(self.output.shape[self.axis])
        centre = move[0, 3] + move[0, self.axis] * planes
        low, high = centre.copy(), centre.copy()
        for other in {0, 1, 2} - {self.axis}:
            span = move[0, other] * (self.output.shape[other] - 1)
            low, high = low + min(span, 0), high + max(span, 0)
        last = self.network.shape[0] - 1
        # one plane to spare: rounded headers move a voxel by a thousandth
        low = np.clip(np.floor(low - 1e-2), 0, last).astype(int)
        high = np.clip(np.ceil(high + 1e-2), 0, last).astype(int)
        return low, high

    def push(self, first: int, logits: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """Network planes (P, n, H, W) → (output planes' indices, logits (P, …) with those planes on `axis`)."""
        self.held = logits if self.held is None else torch.cat([self.held, logits], dim=1)
        end = first + logits.shape[1]
        self.most_planes = max(self.most_planes, self.held.shape[1])
        ready = self.next
        while ready < len(self.order) and self.high[ready] < end:
            ready += 1
        if ready > self.next:
            source = self.network.crop(0, self.first, end)
            for start in range(self.next, ready, 16):
                chosen = self.order[start : min(start + 16, ready)]
                low, high = min(chosen), max(chosen) + 1
                target = self.output.crop(self.axis, low, high)
                yield (
                    list(range(low, high)),
                    resample(self.held, source, target, fill=OUTSIDE, antialias=False),
                )
            self.next = ready
        keep = int(self.needed_from[self.next]) if self.next < len(self.order) else end
        drop = min(max(0, keep - self.first), self.held.shape[1])
        self.held, self.first = self.held[:, drop:], self.first + drop
