"""Masks stored as one bit per voxel inside of boxes, compressed, and unpacked one at a time."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mome.inference.meant_name import meant_name

_ALL = slice(None)

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class _Part:
    """A part of a mask: bits of a block of planes.

    Attributes:
        first: The first voxel in the order (planes, rows, columns) of the axes.
        shape: Voxels in this order.
        box: The smallest box that holds all voxels of the mask in this part, first and last + 1, in this order.
        data: The bits, every row padded to whole bytes, compressed by zlib.
    """

    first: tuple[int, int, int]
    shape: tuple[int, int, int]
    box: Box
    data: bytes

    def unpacked(self, planes: slice = _ALL, rows: slice = _ALL) -> np.ndarray:
        """Returns some planes and rows of the block, uint8 of 0 and 1, in the order (planes, rows, columns)."""
        bits = np.frombuffer(zlib.decompress(self.data), dtype=np.uint8).reshape(*self.shape[:2], -1)
        return np.unpackbits(bits[planes, rows], axis=-1, count=self.shape[2])


class PackedMasks(Mapping[str, np.ndarray]):
    """Prompt → mask, uint8 (i, j, k) of 0 and 1; it is unpacked at every access. An empty mask takes no memory.

    Args:
        names: Names of the prompts.
        shape: Voxels of the scan (i, j, k).
        axis: The axis along which planes are written.

    Attributes:
        voxels: Prompt → number of voxels in its mask.
    """

    def __init__(self, names: list[str], shape: tuple[int, int, int], axis: int) -> None:
        self.names, self.shape, self.axis = names, shape, axis
        # planes, rows, columns: of the other axes the one of the lower index is the fastest, as in files of masks
        self._order = (axis, *sorted({0, 1, 2} - {axis}, reverse=True))
        self._parts: dict[str, list[_Part]] = {name: [] for name in names}
        self.voxels = dict.fromkeys(names, 0)

    def write(self, name: str, planes: Sequence[int], block: np.ndarray) -> None:
        """Stores planes of one mask.

        Args:
            name: The prompt.
            planes: Their indices along `axis`; each plane is written once.
            block: Bool, on the scan's axes, with these planes along `axis`.
        """
        for place, plane in enumerate(planes):
            first = [0, 0, 0]
            first[self.axis] = plane
            self.write_box(name, (first[0], first[1], first[2]), np.take(block, [place], self.axis))

    def write_box(self, name: str, first: tuple[int, int, int], block: np.ndarray) -> None:
        """Stores the voxels of one mask inside of a box; boxes may overlap, but each voxel is stored once.

        Args:
            name: The prompt.
            first: The first voxel (i, j, k) of the box.
            block: Bool, on the scan's axes.
        """
        ordered = block.transpose(self._order)
        count = int(np.count_nonzero(ordered))
        if not count:
            return
        bits = np.packbits(ordered, axis=-1)
        planes, rows = np.flatnonzero(bits.any(axis=(1, 2))), np.flatnonzero(bits.any(axis=(0, 2)))
        # Bits without a voxel at both ends of the rows cost nothing once they are compressed.
        columns = np.flatnonzero(np.unpackbits(np.bitwise_or.reduce(bits, axis=(0, 1))))
        ends = [(int(places[0]), int(places[-1]) + 1) for places in (planes, rows, columns)]
        kept = bits[slice(*ends[0]), slice(*ends[1])]
        corner = [first[axis] for axis in self._order]
        part = _Part(
            first=(corner[0] + ends[0][0], corner[1] + ends[1][0], corner[2]),
            shape=(kept.shape[0], kept.shape[1], ordered.shape[2]),
            box=tuple((at + a, at + b) for at, (a, b) in zip(corner, ends, strict=True)),  # type: ignore[arg-type]
            data=zlib.compress(kept.tobytes(), 1),
        )
        self._parts[name].append(part)
        self.voxels[name] += count

    def replace(self, name: str, first: tuple[int, int, int], block: np.ndarray) -> None:
        """Replaces a mask by the voxels of a box; outside of it the mask is then empty.

        Args:
            name: The prompt.
            first: The first voxel (i, j, k) of the box.
            block: Bool, on the scan's axes.
        """
        self._parts[name], self.voxels[name] = [], 0
        self.write_box(name, first, block)

    def box(self, name: str) -> Box:
        """Returns the first and last + 1 voxel along i, j and k of the smallest box around a mask.

        An empty mask has (0, 0) along every axis.

        Raises:
            KeyError: There is no such mask.
        """
        parts = self._parts[self.name_of(name)]
        box = [(0, 0)] * 3
        for place, axis in enumerate(self._order):
            if parts:
                box[axis] = min(part.box[place][0] for part in parts), max(part.box[place][1] for part in parts)
        return box[0], box[1], box[2]

    def crop(self, name: str) -> np.ndarray:
        """Returns a mask inside of its box (`box`), uint8 of 0 and 1, in Fortran order.

        Raises:
            KeyError: There is no such mask.
        """
        box = self.box(name)
        out = np.zeros([stop - start for start, stop in box], dtype=np.uint8, order="F")
        self._fill(out, name, [start for start, _ in box])
        return out

    def _fill(self, out: np.ndarray, name: str, origin: Sequence[int]) -> None:
        """Writes a mask into an array (i, j, k) of zeros whose first voxel is `origin`."""
        view = out.transpose(self._order)
        start = [origin[axis] for axis in self._order]
        for part in self._parts[self.name_of(name)]:
            target = [slice(max(0, a - at), b - at) for (a, b), at in zip(part.box, start, strict=True)]
            source = [slice(a - at, b - at) for (a, b), at in zip(part.box, part.first, strict=True)]
            view[tuple(target)] |= part.unpacked()[tuple(source)]

    def sampled(self, name: str, step: int) -> np.ndarray:
        """Returns every `step`-th voxel of a mask along every axis, from voxel 0, as bool."""
        if step == 1:
            return self[name].view(bool)
        out = np.zeros([-(-side // step) for side in self.shape], dtype=bool)
        view = out.transpose(self._order)
        for part in self._parts[self.name_of(name)]:
            firsts = [-(-at // step) for at in part.first]  # the first samples at or after the part
            places = [slice(first * step - at, None, step) for first, at in zip(firsts, part.first, strict=True)]
            values = part.unpacked(places[0], places[1])[:, :, places[2]]
            view[tuple(slice(a, a + n) for a, n in zip(firsts, values.shape, strict=True))] |= values.view(bool)
        return out

    def take(self, other: PackedMasks) -> None:
        """Takes the masks of other prompts of the same scan over."""
        self._parts.update(other._parts)
        self.voxels.update(other.voxels)

    def name_of(self, key: str) -> str:
        """Returns the prompt whose mask is meant by its name or by a synonym of the class table.

        Raises:
            KeyError: There is no such mask; the message names the masks there are.
        """
        return meant_name(key, self.names, "mask")

    def __contains__(self, key: object) -> bool:
        try:
            return self.name_of(key) in self._parts  # type: ignore[arg-type]
        except KeyError:
            return False

    def __getitem__(self, name: str) -> np.ndarray:
        out = np.zeros(self.shape, dtype=np.uint8)
        self._fill(out, name, (0, 0, 0))
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
