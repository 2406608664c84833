"""One training or evaluation case: a scan, and where the masks of its annotated structures are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mome.errors import InputError
from mome.labels.dataset import StructureRule
from mome.volumes import Grid, Volume, read_label_map, read_volume
from mome.volumes.label_map import listed_values, read_mask, unnamed_values
from mome.volumes.reordered import reordered
from mome.volumes.structure_masks import structure_mask

_OTHER_GRID = "resample the label map to the image's grid, by nearest neighbour"

WITHOUT_VOXEL = "annotated, but without a voxel"  # of a note on structures


@dataclass(frozen=True)
class Case:
    """One scan with its annotation.

    Attributes:
        name: The case's name.
        image: Path of the scan.
        labels: Path of the label map; None where every structure has a file of its own.
        annotated: Names of the structures annotated in this case. All others are unknown here, not background.
        rules: Structure → values of the label map.
        named_values: All values of the label map that the data set names.
        masks: Structure → its mask files, whose union is the structure.
        patient: Cases of one patient must not lie in two splits; the case's name where nothing else is known.
        split: `train`, `val` or `test` where the data says so, else empty.
        ignored_values: Values of voxels that nobody annotated. A case with such voxels is refused: a structure is
            annotated in the whole of a case, or not at all.
    """

    name: str
    image: Path
    labels: Path | None
    annotated: tuple[str, ...]
    rules: Mapping[str, StructureRule] = field(default_factory=dict)
    named_values: frozenset[int] = frozenset()
    masks: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    patient: str = ""
    split: str = ""
    ignored_values: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "patient", self.patient or self.name)

    def read_image(self) -> Volume:
        """Reads the scan, in HU.

        Raises:
            InputError: The file cannot be read.
        """
        return read_volume(self.image)

    @property
    def files(self) -> list[Path]:
        """All files of the case, the scan first."""
        maps = [] if self.labels is None else [self.labels]
        return [self.image, *maps, *(path for paths in self.masks.values() for path in paths)]

    def read_masks(self, grid: Grid) -> tuple[dict[str, np.ndarray], list[str]]:
        """Reads the masks of the annotated structures.

        A structure whose sides cannot be told apart is left out, with a note: it is unknown in this case.

        Args:
            grid: The scan's grid, on which the masks must lie; their voxels may be stored in another order.

        Returns:
            Structure → bool (i, j, k), and notes on values without a name and on structures without a voxel.

        Raises:
            InputError: A file cannot be read or lies on another grid, voxels are marked as not annotated, or structures
                are annotated and none has a voxel.
        """
        if self.labels is not None:
            masks, notes, present = self._from_label_map(self.labels, grid)
        else:
            masks, notes, present = self._from_files(grid), [], []
        empty = [name for name, mask in masks.items() if not mask.any()]
        if masks and len(empty) == len(masks):
            held = f": the label map holds {listed_values(present) or 'only 0'}" if self.labels is not None else ""
            some = ", ".join(f"{name} {self._values(name)}".strip() for name in list(masks)[:4])
            raise InputError(
                f"no structure annotated in case {self.name!r} has a voxel{held}",
                where=str(self.labels or self.image),
                hint=f"numbers: {some}" if self.labels is not None else f"annotated: {some}",
            )
        if empty:
            notes.append(f"case {self.name!r}: {WITHOUT_VOXEL}: {', '.join(empty)}")
        return masks, notes

    def _from_label_map(self, path: Path, grid: Grid) -> tuple[dict[str, np.ndarray], list[str], list[int]]:
        labels = _on_grid(read_label_map(path), grid, path)
        masks, notes = dict[str, np.ndarray](), list[str]()
        unknown = unnamed_values(labels.array, self.named_values)
        ignored = int(np.isin(labels.array, list(self.ignored_values)).sum()) if self.ignored_values else 0
        if ignored:
            raise InputError(
                f"{ignored} voxels of case {self.name!r} are marked as not annotated (label 'ignore'); they would "
                "count as background",
                where=str(path),
                hint="leave the case out, or annotate it whole and remove the label",
            )
        if unknown:
            notes.append(f"case {self.name!r}: the data set does not name the label values {listed_values(unknown)}")
        for name in self.annotated:
            try:
                masks[name] = structure_mask(labels.array, labels.affine, self.rules[name], name)
            except InputError as error:
                notes.append(f"case {self.name!r}: {error.what}; it counts as not annotated")
        return masks, notes, unnamed_values(labels.array, ())

    def _from_files(self, grid: Grid) -> dict[str, np.ndarray]:
        masks = dict[str, np.ndarray]()
        for name in self.annotated:
            union = np.zeros(grid.shape, dtype=bool)
            for path in self.masks[name]:
                union |= _on_grid(read_mask(path), grid, path).array
            masks[name] = union
        return masks

    def _values(self, name: str) -> str:
        rule = self.rules.get(name)
        return "" if rule is None else " + ".join(map(str, rule.values))


def _on_grid(labels: Volume, grid: Grid, path: Path) -> Volume:
    """Returns a label map with its voxels in the order of the scan's, as where one is stored as LAS and one as LPS.

    Raises:
        InputError: It lies on another grid. Nothing is resampled.
    """
    labels = reordered(labels, grid)
    if not grid.same_as(labels.grid, tolerance=0.01):
        raise InputError(
            "image and label map are on different grids: " + grid.difference(labels.grid),
            where=str(path),
            hint=_OTHER_GRID,
        )
    return labels
