"""One person's anatomy: a label map, the tissue around it, and the CT where there is one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mome.data.synthetic.body import add_spine_and_lungs, fill_from_ct, fill_from_labels, outer_distance
from mome.errors import InputError
from mome.labels import LabelMap, load_dataset, load_table
from mome.volumes import network_grid, read_label_map, read_volume, resample
from mome.volumes.reordered import reordered

SPACING_MM = 3.0  # of the grid on which anatomies are kept; our choice

# A structure that is the union of others, where a data set labels only its parts.
UNIONS = {
    "lung_left": ("lung_upper_lobe_left", "lung_lower_lobe_left"),
    "lung_right": ("lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right"),
}


@dataclass(frozen=True)
class Anatomy:
    """An anatomy on an isotropic grid whose axes run to the right, anterior and superior (RAS).

    Attributes:
        ids: uint8 (i, j, k): ids of the class table, or a filling of `mome.data.synthetic.body`.
        distance: float32 (i, j, k), distance in mm to the body without its outer fat, negative inside.
        hu: float32 (i, j, k), the CT; None where there is none.
        members: Structure → its ids, of every structure that the annotation covers, whether it has voxels or not.
        spacing: Voxel side in mm.
    """

    ids: np.ndarray
    distance: np.ndarray
    hu: np.ndarray | None
    members: dict[str, tuple[int, ...]]
    spacing: float


def load_anatomy(
    label_map: str | Path, dataset: str, image: str | Path | None = None, unknown: Collection[str] = ()
) -> Anatomy:
    """Reads an anatomy and fills what its label map does not name.

    Args:
        label_map: File of the label map.
        dataset: The data set whose label numbers it uses. All its structures that are one number of their own count as
            annotated.
        image: The CT of the label map, or None.
        unknown: Structures of the data set that are not annotated in this label map.

    Raises:
        InputError: A file cannot be read, the data set or a name is unknown, a label is negative, no voxel is labelled,
            image and label map are on different grids, or a label stands for no single structure and there is no CT.
    """
    table, named = load_table(), load_dataset(dataset)
    numbers = named.name_to_id
    if not numbers:
        raise InputError(f"data set {dataset!r} has no numbers: its structures are files", where=str(label_map))
    known = {*numbers, *UNIONS}
    wrong = [name for name in unknown if name not in known]
    if wrong:
        raise InputError(f"data set {dataset!r} has no structure {wrong[0]!r:.60}", where=str(label_map))
    labels = read_label_map(label_map)
    volume = None if image is None else read_volume(image)
    if volume is not None:  # the axes of one may be turned, as LAS beside LPS
        labels = reordered(labels, volume.grid)
    values = np.asarray(labels.array)
    if values.min() < 0:
        raise InputError(f"a label map holds no negative numbers, this one holds {values.min()}", where=str(label_map))
    if image is None:
        _check_single(values, named, label_map)
    lookup = np.zeros(max(numbers.values()) + 2, dtype=np.uint8)  # the last entry is for all numbers without a name
    for name, number in numbers.items():
        lookup[number] = table[name].id
    target = network_grid(labels.grid, spacing=(SPACING_MM,) * 3, orientation="RAS")
    mapped = torch.from_numpy(lookup[np.minimum(values.astype(np.int32), len(lookup) - 1)])
    ids = resample(mapped.float(), labels.grid, target, mode="nearest", fill=0.0).to(torch.uint8).numpy()
    if not ids.any():
        raise InputError("no voxel of the label map is labelled", where=str(label_map), hint=f"is it of {dataset!r}?")

    hu = None
    if volume is not None:
        if not volume.grid.same_as(labels.grid, tolerance=0.01):
            raise InputError(
                "image and label map are on different grids: " + volume.grid.difference(labels.grid),
                where=str(label_map),
            )
        array = torch.as_tensor(volume.array, dtype=torch.float32)
        hu = resample(array, volume.grid, target, fill=-1000.0).numpy()
        ids, inner = fill_from_ct(ids, hu, SPACING_MM)
    else:
        if not any(name.startswith("vertebrae") for name in numbers) and "aorta" in numbers:
            ids = add_spine_and_lungs(ids, table["aorta"].id, SPACING_MM)
        ids, inner = fill_from_labels(ids, SPACING_MM)
    distance = outer_distance(inner, SPACING_MM)

    members: dict[str, tuple[int, ...]] = {name: (table[name].id,) for name in numbers}
    for union, parts in UNIONS.items():
        if union not in members and all(part in members and part not in unknown for part in parts):
            members[union] = tuple(table[part].id for part in parts)
    return Anatomy(
        ids=ids,
        distance=distance,
        hu=hu,
        members={name: found for name, found in members.items() if name not in unknown},
        spacing=SPACING_MM,
    )


def _check_single(values: np.ndarray, dataset: LabelMap, where: str | Path) -> None:
    """Checks that no voxel has a number that is no structure of its own: it would be painted as if nothing were there.

    Raises:
        InputError: One has, as 1 of `lits`, the liver without its tumours, or a number that both kidneys share.
    """
    shared = dataset.values - set(dataset.name_to_id.values())
    found = sorted(shared.intersection(np.unique(values).tolist())) if shared else []
    if found:
        names = [name for name, rule in dataset.structures.items() if found[0] in rule.values]
        raise InputError(
            f"number {found[0]} of data set {dataset.name!r} is no structure of its own (it is in {', '.join(names)}), "
            "so that it cannot be painted",
            where=str(where),
            hint="name the CT of the label map (image), or a label map whose structures are one number each",
        )
