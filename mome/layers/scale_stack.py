"""Brings the maps of all scales to the finest size and stacks them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class ScaleStack:
    """Collects S maps (B, C, D_s, H_s, W_s) as one tensor (B, S, C, D, H, W), coarse maps trilinearly resized.

    Without gradients every map is written to its place at once; a list of maps to be stacked later would hold each of
    them twice.

    Args:
        scales: S.
        size: The finest size (D, H, W).
    """

    def __init__(self, scales: int, size: Sequence[int]) -> None:
        self.scales, self.size = scales, tuple(size)
        self.maps: list[Tensor] = []
        self.filled = 0
        self.stack: Tensor | None = None

    def add(self, map_BCDHW: Tensor) -> None:
        """Adds the map of the next scale."""
        if torch.is_grad_enabled():
            self.maps.append(self._resized(map_BCDHW))
            return
        if self.stack is None:
            self.stack = map_BCDHW.new_empty(map_BCDHW.shape[0], self.scales, map_BCDHW.shape[1], *self.size)
        self.stack[:, self.filled].copy_(self._resized(map_BCDHW))
        self.filled += 1

    def stacked(self) -> Tensor:
        """The stack (B, S, C, D, H, W) of all maps."""
        if self.stack is not None:
            return self.stack
        return torch.stack(self.maps, dim=1)

    def _resized(self, map_BCDHW: Tensor) -> Tensor:
        if map_BCDHW.shape[2:] == self.size:
            return map_BCDHW
        return F.interpolate(map_BCDHW, size=self.size, mode="trilinear", align_corners=False)
