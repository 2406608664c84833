"""The three planes of one prompt: the CT, the mask's cut, and the values of the network grid that are drawn on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mome.inspection.tiles import Tile
from mome.viz.preview import PLANES, cut_masks, picture_grid
from mome.volumes import Grid, Volume, resample


@dataclass
class View:
    """The planes of one prompt on the picture's grid, of which only the network voxels that they cut are stored.

    Attributes:
        name: The prompt.
        grid: The picture's grid; see `mome.viz.preview.picture_grid`.
        images: Axis → plane of the CT in HU.
        cuts: Axis → the mask's cut as soft values; empty where the mask is empty.
        pixels: Axis → for every pixel the number of its network voxel, −1 outside the network grid.
        voxels_N3: The N network voxels.
        scale_N: The scale that weighs most; −1 where all weigh the same.
        weight_N: The weight of that scale.
        experts: Router → the expert that weighs most; −1 where a voxel has none.
    """

    name: str
    grid: Grid
    images: dict[int, np.ndarray]
    cuts: dict[int, np.ndarray]
    pixels: dict[int, np.ndarray]
    voxels_N3: Tensor
    scale_N: Tensor
    weight_N: Tensor
    experts: dict[str, Tensor] = field(default_factory=dict)

    def inside(self, tile: Tile, stride: tuple[int, ...], sides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The numbers of the voxels that a tile owns, and where they lie in a map of the tile (as flat indices)."""
        lows, highs = (torch.tensor(ends) for ends in zip(*tile.owned, strict=True))
        numbers = ((self.voxels_N3 >= lows) & (self.voxels_N3 < highs)).all(dim=1).nonzero()[:, 0]
        d, h, w = ((self.voxels_N3[numbers] - torch.tensor(tile.origin)) // torch.tensor(stride)).unbind(dim=1)
        return numbers, (d * sides[1] + h) * sides[2] + w

    def set_experts(self, router: str, numbers: Tensor, winner: Tensor) -> None:
        """Stores the winners of a router at some of the voxels."""
        if router not in self.experts:
            self.experts[router] = torch.full((len(self.voxels_N3),), -1, dtype=torch.int16)
        self.experts[router][numbers] = winner

    def on_plane(self, axis: int, values_N: Tensor) -> np.ma.MaskedArray:
        """Values of the network voxels as a plane of the picture; pixels outside the network grid are masked."""
        numbers = self.pixels[axis]
        return np.ma.masked_array(values_N.numpy()[np.maximum(numbers, 0)], numbers < 0)


def plan_views(volume: Volume, masks: Mapping[str, np.ndarray], network: Grid) -> Iterator[View]:
    """Chooses three planes through every structure, and through the middle of the scan where a mask is empty.

    Args:
        volume: The scan in HU.
        masks: Structure → mask on the scan's grid; one is unpacked at a time.
        network: The network grid.
    """
    grid = picture_grid(volume.grid)
    hu = resample(volume.array, volume.grid, grid, fill=-1024.0).numpy()
    for name in masks:
        planes, cuts = cut_masks({name: masks[name]}, volume.grid, grid)
        flat = {axis: _network_voxels(grid, axis, planes[axis], network) for _, axis in PLANES}
        known, numbers = np.unique(np.concatenate([one.ravel() for one in flat.values()]), return_inverse=True)
        outside = int(known[0] < 0)  # pixels outside the network grid share the number −1, which sorts first
        pixels, start = {}, 0
        for axis, one in flat.items():
            pixels[axis] = numbers[start : start + one.size].reshape(one.shape) - outside
            start += one.size
        voxels_N3 = torch.from_numpy(np.stack(np.unravel_index(known[outside:], network.shape), axis=1))
        yield View(
            name,
            grid,
            {axis: np.take(hu, planes[axis], axis=axis) for _, axis in PLANES},
            cuts.get(name, {}),
            pixels,
            voxels_N3,
            torch.full((len(voxels_N3),), -1, dtype=torch.int16),
            torch.zeros(len(voxels_N3)),
        )


def _network_voxels(grid: Grid, axis: int, plane: int, network: Grid) -> np.ndarray:
    """For every pixel of a plane the flat index of the network voxel that holds its centre; −1 outside the grid."""
    shape = [1 if a == axis else side for a, side in enumerate(grid.shape)]
    index = np.indices(shape).reshape(3, -1).astype(np.float64)
    index[axis] = plane
    to_network = np.linalg.inv(network.affine) @ grid.affine
    at = np.rint(to_network[:3, :3] @ index + to_network[:3, 3:]).astype(np.int64)
    limits = np.array(network.shape)[:, None]
    inside = ((at >= 0) & (at < limits)).all(axis=0)
    flat = np.ravel_multi_index(tuple(np.clip(at, 0, limits - 1)), network.shape)
    return np.where(inside, flat, -1).reshape([side for a, side in enumerate(grid.shape) if a != axis])
