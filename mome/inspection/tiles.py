"""The tiles of the sliding window, and the voxels that each of them shows.

Tiles overlap, and inference averages their logits. The choice of an expert cannot be averaged, so every voxel shows the
tile that weighs most in that average: the one whose centre is nearest along every axis. The voxels of a tile are then a
box, every voxel belongs to one tile, and sums over tiles are sums over the volume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from mome.inference.tiles import tile_starts, tile_steps


class Tile(NamedTuple):
    """One tile.

    Attributes:
        origin: Its first voxel (d, h, w) on the network grid.
        owned: The voxels of the network grid that it shows, first and last + 1 along each axis.
    """

    origin: tuple[int, int, int]
    owned: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

    def slices(self, origin: Sequence[int] = (0, 0, 0)) -> tuple[slice, slice, slice]:
        """The owned box as slices of an array that begins at `origin`."""
        first, second, third = (slice(low - o, high - o) for (low, high), o in zip(self.owned, origin, strict=True))
        return first, second, third


def owned_tiles(size: Sequence[int], patch: Sequence[int], overlap: float) -> Iterator[Tile]:
    """The tiles of a volume in the order of inference.

    Args:
        size: Voxels of the volume along each axis; a shorter one than the tile is padded, and the padding is not owned.
        patch: Voxels of a tile along each axis.
        overlap: The share of a tile that its neighbour covers too.
    """
    steps = tile_steps(size, patch, overlap)
    axes = [_owned_along(side, p, step) for side, p, step in zip(size, patch, steps, strict=True)]
    for d, h, w in product(*axes):
        yield Tile((d[0], h[0], w[0]), (d[1], h[1], w[1]))


def _owned_along(size: int, patch: int, step: int) -> list[tuple[int, tuple[int, int]]]:
    """The first voxel of each tile along one axis, and the voxels that are nearest to its centre.

    Of two centres that are equally near, the first tile owns the voxel.
    """
    starts = tile_starts(size, patch, step)
    ends = [(a + b + patch - 1) // 2 + 1 for a, b in zip(starts, starts[1:], strict=False)] + [size]
    return [(start, (low, high)) for start, low, high in zip(starts, [0, *ends[:-1]], ends, strict=True)]
