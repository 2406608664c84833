"""The masks of one scan with what a writer needs to store them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mome.volumes.boxed import BoxedArray
from mome.volumes.grid import Grid


@dataclass(frozen=True)
class FlatMap:
    """One map of ids, in which smaller structures cover larger ones.

    Attributes:
        array: (i, j, k) of the labels' ids, uint8, or uint16 where an id is above 255.
        voxels: Structure → number of its voxels in the map; those of its mask that a smaller one covers are not there.
        overlap: Number of voxels that more than one mask claims.
    """

    array: np.ndarray
    voxels: Mapping[str, int]
    overlap: int


@dataclass(frozen=True)
class MaskSet:
    """Masks of one scan on its own grid.

    Attributes:
        masks: Structure → uint8 (i, j, k) of 0 and 1. The mapping may make an array at each access; a writer reads
            one mask at a time.
        labels: One entry `{"id", "name", "snomed", "color"}` per structure, with the ids of the class table.
        voxels: Structure → number of voxels in its mask.
        grid: The scan's grid.
        header: `Volume.header` of the scan.
        source: The scan's file or DICOM folder; None where the scan was passed as an array.
        model: The name of the model that made the masks, without its folder; empty where it has none.
        model_version: The fingerprint of its weights and config; empty where it was not computed.
        scan: `mome.volumes.scan_digest.scan_digest` of the scan; empty where it was not computed.
    """

    masks: Mapping[str, np.ndarray]
    labels: list[dict[str, Any]]
    voxels: Mapping[str, int]
    grid: Grid
    header: dict[str, Any] = field(default_factory=dict)
    source: Path | None = None
    model: str = ""
    model_version: str = ""
    scan: str = ""

    def only(self, structure: str) -> MaskSet:
        """Returns the set that holds a single structure."""
        return replace(self, labels=[entry for entry in self.labels if entry["name"] == structure])

    def label_map(self) -> tuple[np.ndarray, int]:
        """Returns one array (i, j, k) of the labels' ids, and the number of voxels that more than one mask claims."""
        return self.flat.array, self.flat.overlap

    @cached_property
    def flat(self) -> FlatMap:
        """The masks as one map of ids; it is made once and lives as long as this set."""
        ids = {entry["name"]: entry["id"] for entry in self.labels}
        array = np.zeros(self.grid.shape, dtype=np.uint16 if max(ids.values()) > 255 else np.uint8, order="F")
        several: np.ndarray | None = None  # where more than one mask is; made where two overlap
        for name in sorted(ids, key=lambda name: -self.voxels[name]):
            boxed = self.boxed(name)
            mask = boxed.values.view(bool)
            region = tuple(slice(at, at + side) for at, side in zip(boxed.first, mask.shape, strict=True))
            part = array[region]
            claimed = (part > 0) & mask
            if claimed.any():
                several = np.zeros_like(array, dtype=bool) if several is None else several
                several[region] |= claimed
            np.copyto(part, ids[name], where=mask, casting="unsafe")
        if several is None:
            return FlatMap(array, {name: self.voxels[name] for name in ids}, 0)
        counts = np.zeros(max(ids.values()) + 1, dtype=np.int64)
        for k in range(array.shape[2]):  # plane by plane, because `bincount` makes a copy of eight bytes per voxel
            counts += np.bincount(array[:, :, k].ravel(order="F"), minlength=len(counts))
        return FlatMap(array, {name: int(counts[ids[name]]) for name in ids}, int(np.count_nonzero(several)))

    def boxed(self, structure: str) -> BoxedArray:
        """Returns a mask as an array that is zero outside of its box, where the mapping knows boxes.

        Such a mapping has `box(name)`, the first and last + 1 voxel along every axis, and `crop(name)`, the mask
        inside of it.
        """
        if hasattr(self.masks, "box") and hasattr(self.masks, "crop"):
            i, j, k = (start for start, _ in self.masks.box(structure))
            return BoxedArray(self.grid.shape, (i, j, k), self.masks.crop(structure))
        return BoxedArray.whole(np.asarray(self.masks[structure], dtype=np.uint8))
