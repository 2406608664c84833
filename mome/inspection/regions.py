"""The parts of a scan that loads are given for: all of it, the body, and every predicted structure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mome.inspection.tiles import Tile
from mome.volumes import Grid, resample
from mome.volumes.axis_sampling import parallel_axes

SCAN, BODY = "whole scan", "body"


class Regions:
    """Regions on the network grid. A structure is stored inside its bounding box only.

    Args:
        volume: (D, H, W) in [0, 1]; the body is what is above 0, the low end of the HU window.
        network: The grid of `volume`. It may reach beyond the scan (`MoMEProcessor.extended`), where no region is.
        masks: Structure → mask on the scan's grid; one is unpacked at a time.
        scan: The scan's grid.

    Attributes:
        names: The whole scan, the body, then the structures.
    """

    def __init__(self, volume: Tensor, network: Grid, masks: Mapping[str, np.ndarray], scan: Grid) -> None:
        self.volume = volume
        self.names = [SCAN, BODY, *masks]
        self._scan = _holds_scan(scan, network)
        self._boxes = {name: _boxed(resample(mask, scan, network) > 0.5) for name, mask in masks.items()}

    def voxels(self, name: str, tile: Tile) -> Tensor:
        """The voxels of a region inside the box that a tile owns, bool of the box's shape."""
        scan = self._scan[tile.slices()]
        if name == SCAN:
            return scan
        if name == BODY:
            return scan & (self.volume[tile.slices()] > 0)
        inside = torch.zeros_like(scan)
        lows, box = self._boxes[name]
        into, out = [], []
        for (low, high), start, side in zip(tile.owned, lows, box.shape, strict=True):
            first, last = max(low, start), min(high, start + side)
            if first >= last:
                return inside
            into.append(slice(first - low, last - low))
            out.append(slice(first - start, last - start))
        inside[tuple(into)] = box[tuple(out)]
        return inside

    def count_on_map(self, names: Sequence[str], tile: Tile, sides: Sequence[int], stride: Sequence[int]) -> Tensor:
        """How many voxels of each region lie in each voxel of a tile's map: (R, T) float32.

        Args:
            names: The regions.
            tile: The tile; only voxels that it owns are counted.
            sides: Voxels of the map along each axis.
            stride: Voxels of the network grid per voxel of the map.
        """
        patch = [side * step for side, step in zip(sides, stride, strict=True)]
        counts = []
        for name in names:
            inside = torch.zeros(patch)
            inside[tile.slices(tile.origin)] = self.voxels(name, tile).float()
            blocks = inside.view(sides[0], stride[0], sides[1], stride[1], sides[2], stride[2])
            counts.append(blocks.sum(dim=(1, 3, 5)).flatten())
        return torch.stack(counts)


def _holds_scan(scan: Grid, network: Grid) -> Tensor:
    """Returns which voxels of the network grid hold a part of the scan; of an oblique grid, whose centres lie in it."""
    samplings = parallel_axes(network, scan)
    if samplings is None:
        return resample(torch.ones(scan.shape), scan, network, mode="nearest") > 0.5
    planes = [slice(0, side) for side in network.shape]
    for sampling in samplings:
        half = abs(sampling.step) / 2
        # Rounded headers must not add a plane, as in `network_grid`.
        first, last = sampling.at.min() - half + 0.5 + 1e-3, sampling.at.max() + half - 0.5 - 1e-3
        planes[sampling.source_axis] = slice(max(0, math.floor(first)), math.ceil(last) + 1)
    holds = torch.zeros(network.shape, dtype=torch.bool)
    holds[tuple(planes)] = True
    return holds


def _boxed(inside: Tensor) -> tuple[list[int], Tensor]:
    """The first voxel of a mask's bounding box, and the mask inside it; an empty box where the mask is empty."""
    lows, slices = [], []
    for axis in range(3):
        flat = inside.movedim(axis, 0).flatten(1).any(dim=1).nonzero()
        low, high = (int(flat[0]), int(flat[-1]) + 1) if len(flat) else (0, 0)
        lows.append(low)
        slices.append(slice(low, high))
    return lows, inside[tuple(slices)].clone()
