"""Logits that are known beforehand: signed distances of real structures, in place of those of a network.

The bundled model knows seven structures of the neck, so most of its masks are empty in other regions. With known logits
the rest of a segmentation handles masks as large as real ones, whatever the network knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from scipy.signal import fftconvolve
from torch import Tensor

from mome.inference.predictor import Predictor
from mome.volumes import Grid, Volume, resample

FAR_MM = 20.0  # distances are clipped here; the sign is all that a mask depends on
Box = tuple[slice, slice, slice]


@dataclass
class SignedDistances:
    """Signed distances to the surfaces of structures in mm, positive inside, at most `FAR_MM`.

    Each is stored in the box around the structure; outside of it the distance is −`FAR_MM`.

    Attributes:
        shape: Voxels (D, H, W) of the grid.
        boxes: One box per structure, as three (start, stop).
        values: Its distances, float16.
    """

    shape: tuple[int, int, int]
    boxes: list[Box]
    values: list[np.ndarray]

    @classmethod
    def of_masks(cls, masks: Sequence[np.ndarray], spacing: Sequence[float]) -> SignedDistances:
        """Computes the distances of masks, bool (D, H, W), on a grid of `spacing` mm."""
        boxes, values = [], []
        for mask in masks:
            box = _box_around(mask, [int(np.ceil(FAR_MM / step)) + 1 for step in spacing])
            inside = mask[box]
            if not inside.any():
                boxes.append(box)
                values.append(np.full(inside.shape, -FAR_MM, np.float16))
                continue
            distance = distance_transform_edt(inside, spacing) - distance_transform_edt(~inside, spacing)
            # The surface lies half a voxel from the outer voxel centres. The hundredth keeps interpolated values from
            # being exactly 0, where rounding would decide.
            distance += 0.01 - np.sign(distance) * 0.5 * min(spacing)
            boxes.append(box)
            values.append(np.clip(distance, -FAR_MM, FAR_MM).astype(np.float16))
        return cls(tuple(masks[0].shape), boxes, values)

    def write_tile(self, out: Tensor, structure: int, origin: Sequence[int]) -> None:
        """Writes the distances of one structure into a tile.

        Args:
            out: (D, H, W) of the tile; every voxel is written.
            structure: The number of the structure.
            origin: The tile's first voxel on the grid.
        """
        out.fill_(-FAR_MM)
        source, target = [], []
        for axis, part in enumerate(self.boxes[structure]):
            start = max(part.start, origin[axis])
            stop = min(part.stop, origin[axis] + out.shape[axis])
            if start >= stop:
                return
            source.append(slice(start - part.start, stop - part.start))
            target.append(slice(start - origin[axis], stop - origin[axis]))
        out[tuple(target)] = torch.from_numpy(self.values[structure][tuple(source)])

    def dense(self, structure: int) -> np.ndarray:
        """The distances of one structure on the whole grid, float32 (D, H, W)."""
        out = torch.empty(self.shape)
        self.write_tile(out, structure, (0, 0, 0))
        return out.numpy()

    def save(self, path: Path) -> None:
        """Writes the distances to an npz file."""
        boxes = np.array([[(part.start, part.stop) for part in box] for box in self.boxes])
        flat = np.concatenate([value.ravel() for value in self.values])
        np.savez(path, shape=np.array(self.shape), boxes=boxes, values=flat)

    @classmethod
    def load(cls, path: Path) -> SignedDistances:
        """Reads what `save` wrote."""
        with np.load(path) as stored:
            shape = tuple(int(side) for side in stored["shape"])
            flat, sides = stored["values"], stored["boxes"]
        boxes: list[Box] = [tuple(slice(int(a), int(b)) for a, b in box) for box in sides]  # type: ignore[misc]
        sizes = [[part.stop - part.start for part in box] for box in boxes]
        ends = np.cumsum([int(np.prod(size)) for size in sizes])
        values = [part.reshape(size) for part, size in zip(np.split(flat, ends[:-1]), sizes, strict=True)]
        return cls(shape, boxes, values)  # type: ignore[arg-type]


class KnownLogits:
    """A predictor whose logits are signed distances.

    Args:
        inner: Computes every tile too, so that a run takes the time of a network; None leaves that out.
        distances: The logits, on the network grid of the whole scan.
        scan_1DHW: The scan on that grid, which places the tiles: a segmenter that skips air may lay them over a part of
            the grid. None where tiles are laid over the whole grid.
        patch_size: Voxels (D, H, W) of a tile where there is no inner predictor.
    """

    def __init__(
        self,
        inner: Predictor | None,
        distances: SignedDistances,
        scan_1DHW: Tensor | None = None,
        patch_size: tuple[int, int, int] = (64, 64, 64),
    ) -> None:
        self.inner, self.distances, self.scan = inner, distances, scan_1DHW
        self.patch_size = patch_size if inner is None else inner.patch_size
        self.device = torch.device("cpu") if inner is None else inner.device
        self._moved: tuple[int, ...] | None = None if scan_1DHW is not None else (0, 0, 0)

    def encode(self, tile_B1DHW: Tensor, origin: tuple[int, int, int]) -> Any:
        """Returns the inner predictor's features and where the tile lies on the grid of the distances."""
        if self._moved is None:
            found = place_of(tile_B1DHW[0, 0].numpy(), self.scan[0].numpy())
            self._moved = tuple(here - start for here, start in zip(found, origin, strict=True))
        place = [start + moved for start, moved in zip(origin, self._moved, strict=True)]
        return None if self.inner is None else self.inner.encode(tile_B1DHW, origin), place

    def decode(self, features: Any, rows: Tensor) -> Tensor:
        """Returns logits (1, P, D, H, W).

        Args:
            features: What `encode` returned.
            rows: What `with_structures` returned, or some of its rows.
        """
        inner_features, place = features
        if self.inner is None:
            logits = torch.empty(1, len(rows), *self.patch_size)
        else:
            logits = self.inner.decode(inner_features, rows[:, 1:])
        for out, structure in zip(logits[0], rows[:, 0].tolist(), strict=True):
            self.distances.write_tile(out, int(structure), place)
        return logits


def place_of(tile: np.ndarray, volume: np.ndarray) -> tuple[int, ...]:
    """Returns the first voxel of a part of a volume, found by the least sum of squared differences.

    A tile may reach beyond the far end of the volume, where it holds zeros.

    Raises:
        ValueError: The tile is no part of the volume.
    """
    missing = [max(0, side - there) for side, there in zip(tile.shape, volume.shape, strict=True)]
    volume = np.pad(volume, [(0, side) for side in missing])
    ones, flipped = np.ones_like(tile), tile[::-1, ::-1, ::-1]
    volume_64 = volume.astype(np.float64)
    differences = fftconvolve(volume_64**2, ones, mode="valid") - 2 * fftconvolve(volume_64, flipped, mode="valid")
    found = np.unravel_index(int(differences.argmin()), differences.shape)
    part = volume[tuple(slice(start, start + side) for start, side in zip(found, tile.shape, strict=True))]
    if np.abs(part - tile).max() > 0.01:
        raise ValueError("the tile is no part of the volume")
    return tuple(int(start) for start in found)


def with_structures(text_PT: Tensor, structures: Sequence[int]) -> Tensor:
    """Puts the number of each prompt's structure before its text row (P, 1 + T), for `KnownLogits`."""
    return torch.cat([torch.tensor(structures, dtype=text_PT.dtype)[:, None], text_PT], dim=1)


def masks_on(grid: Grid, labels: Volume, ids: Sequence[int]) -> list[np.ndarray]:
    """The masks of some ids of a label map on another grid, by nearest neighbour; bool."""
    array = resample(labels.array.astype(np.float32), labels.grid, grid, mode="nearest", fill=0).numpy()
    return [array == number for number in ids]


def _box_around(mask: np.ndarray, margins: Sequence[int]) -> Box:
    """The smallest box that holds a mask and a margin; one voxel where the mask is empty."""
    parts = []
    for axis, margin in enumerate(margins):
        at = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        first, last = (int(at[0]), int(at[-1])) if len(at) else (0, 0)
        parts.append(slice(max(0, first - margin), min(mask.shape[axis], last + margin + 1)))
    return tuple(parts)  # type: ignore[return-value]
