"""Masks as label maps at the source slices: one map where nothing overlaps, several where masks do."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mome.volumes.dicom.source import SourceSlices
from mome.volumes.dicom_out.source_images import mask_at_slices
from mome.volumes.mask_set import MaskSet


@dataclass
class Layers:
    """Label maps in which no masks overlap.

    Attributes:
        arrays: Per layer (slices, rows, columns), uint8 or uint16: 0, or the number of a structure in its layer.
        members: Per layer the structures by their indices in `MaskSet.labels`; number n is the member n − 1.
        empty: Names of structures whose masks have voxels, and none at a source slice.
    """

    arrays: list[np.ndarray] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)

    @property
    def overlap(self) -> int:
        """Returns the number of voxels that are in several layers, which are those in more than one mask."""
        planes = zip(*self.arrays, strict=True)
        return sum(int(np.count_nonzero(sum((p > 0).astype(int) for p in plane) > 1)) for plane in planes)


def layers_of(masks: MaskSet, source: SourceSlices, *, flat: bool = False) -> Layers:
    """Puts every structure into the first layer in which it overlaps no other.

    One mask is unpacked at a time, so the memory is that of the layers: usually one or two.

    Args:
        masks: The masks.
        source: The slices of the scan.
        flat: Make a single layer, with smaller structures over larger ones.
    """
    slices, (columns, rows) = len(source.slices), source.shape[:2]
    kind = np.uint8 if len(masks.labels) < 256 else np.uint16
    found = Layers()
    if flat or not masks.labels:
        found.arrays.append(np.zeros((slices, rows, columns), kind))
        found.members.append(list(range(len(masks.labels))))
    order = range(len(masks.labels))
    names = [entry["name"] for entry in masks.labels]
    for index in sorted(order, key=lambda index: -masks.voxels[names[index]]) if flat else order:
        mask = mask_at_slices(masks, names[index], source)
        if masks.voxels[names[index]] and not mask.array.size:
            found.empty.append(names[index])
        free = (k for k, array in enumerate(found.arrays) if flat or not array[mask.region][mask.array].any())
        layer = next(free, len(found.arrays))
        if layer == len(found.arrays):
            found.arrays.append(np.zeros((slices, rows, columns), kind))
            found.members.append([])
        if not flat:
            found.members[layer].append(index)
        found.arrays[layer][mask.region][mask.array] = found.members[layer].index(index) + 1
    return found
