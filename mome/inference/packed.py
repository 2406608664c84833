"""Masks stored as one bit per voxel, unpacked one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np

from mome.errors import InputError
from mome.labels import load_table


class PackedMasks(Mapping[str, np.ndarray]):
    """Prompt → mask, uint8 (i, j, k) of 0 and 1; it is unpacked at every access.

    Args:
        names: Names of the prompts.
        shape: Voxels of the scan (i, j, k).
        axis: The axis along which planes are written.

    Attributes:
        voxels: Prompt → number of voxels in its mask.
    """

    def __init__(self, names: list[str], shape: tuple[int, int, int], axis: int) -> None:
        self.names, self.shape, self.axis = names, shape, axis
        self._plane_shape = [n for a, n in enumerate(shape) if a != axis]
        bytes_per_plane = (int(np.prod(self._plane_shape)) + 7) // 8
        self._bits = {name: np.zeros((shape[axis], bytes_per_plane), dtype=np.uint8) for name in names}
        self.voxels = dict.fromkeys(names, 0)

    def write(self, name: str, planes: list[int], block: np.ndarray) -> None:
        """Stores planes of one mask.

        Args:
            name: The prompt.
            planes: Their indices along `axis`; each plane is written once.
            block: Bool, on the scan's axes, with these planes along `axis`.
        """
        rows = np.moveaxis(block, self.axis, 0).reshape(len(planes), -1)
        self._bits[name][planes] = np.packbits(rows, axis=1)
        self.voxels[name] += int(rows.sum())

    def name_of(self, key: str) -> str:
        """Returns the prompt whose mask is meant by its name or by a synonym of the class table.

        Raises:
            KeyError: There is no such mask; the message names the masks there are.
        """
        names: list[str | None] = [key]
        with contextlib.suppress(InputError, AttributeError):  # an empty key, or one that is no text
            resolved = load_table().resolve(key)
            names += [key.strip(), resolved.name if resolved.how in ("exact", "synonym") else None]
        for name in names:
            if name in self._bits:
                return name
        raise KeyError(f"there is no mask of {key!r}, only of {', '.join(self.names)}")

    def __contains__(self, key: object) -> bool:
        try:
            return self.name_of(key) in self._bits  # type: ignore[arg-type]
        except KeyError:
            return False

    def __getitem__(self, name: str) -> np.ndarray:
        flat = np.unpackbits(self._bits[self.name_of(name)], axis=1, count=int(np.prod(self._plane_shape)))
        planes = flat.reshape(self.shape[self.axis], *self._plane_shape)
        return np.ascontiguousarray(np.moveaxis(planes, 0, self.axis))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
