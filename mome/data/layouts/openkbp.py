"""OpenKBP as it is published: a folder per patient with sparse CSV files.

```
folder/pt_1/ct.csv                  columns: index, value; values are HU + 1024
folder/pt_1/voxel_dimensions.csv    three numbers in mm
folder/pt_1/Brainstem.csv           column: index of the voxels of a structure
```
A volume has 128³ voxels; an index counts them in C order (github.com/ababier/open-kbp). The axes run to posterior, left
and inferior, which was deduced from the anatomy, because the files do not say it. The origin is set to 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from mome.data.case import Case
from mome.data.layouts.base import Layout
from mome.errors import InputError
from mome.labels import LabelMap
from mome.volumes import Grid, Volume
from mome.volumes.orientation import parse_orientation
from mome.volumes.scan_files import listed

SHAPE, _OFFSET, _AXES = (128, 128, 128), 1024, "PLI"
# The names of OpenKBP's files.
_FILES = {
    "SpinalCord": "spinal_cord",
    "Brainstem": "brainstem",
    "Esophagus": "esophagus",
    "LeftParotid": "parotid_gland_left",
    "RightParotid": "parotid_gland_right",
    "Mandible": "mandible",
    "Larynx": "larynx",
}


class OpenKBP(Layout):
    """pt_*/ct.csv, voxel_dimensions.csv and a CSV file per structure."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The layout has no settings."""

    shape: ClassVar[str] = "pt_<n>/ct.csv, voxel_dimensions.csv, Brainstem.csv, …"

    def __init__(self, config: Config) -> None:
        pass

    def cases(self, folder: Path, dataset: LabelMap | None) -> list[Case]:
        found: list[Case] = []
        places = [place for place in listed(folder) if place.is_dir() and (place / "ct.csv").is_file()]
        for place in sorted(places, key=lambda p: (len(p.name), p.name)):
            masks = {
                name: (place / f"{file}.csv",) for file, name in _FILES.items() if (place / f"{file}.csv").is_file()
            }
            found.append(CsvCase(place.name, place / "ct.csv", None, tuple(masks), masks=masks, patient=place.name))
        return found


class CsvCase(Case):
    """A case whose scan and masks are sparse CSV files."""

    @property
    def files(self) -> list[Path]:
        return [*super().files, self._voxel_size]

    @property
    def _voxel_size(self) -> Path:
        """The file that decides the grid."""
        return self.image.with_name("voxel_dimensions.csv")

    def read_image(self) -> Volume:
        array = np.zeros(int(np.prod(SHAPE)), dtype=np.float32)
        index, values = _read(self.image, 2)
        array[index] = values
        array = np.maximum(array - _OFFSET, -_OFFSET)
        spacing = _numbers(self._voxel_size)
        if spacing.size != 3 or not (np.isfinite(spacing).all() and (spacing > 0).all()):
            raise InputError(
                "voxel_dimensions.csv holds three positive numbers in mm, "
                f"got {', '.join(f'{v:g}' for v in spacing.flat[:4])}",
                where=str(self._voxel_size),
            )
        affine = np.eye(4)
        affine[:3, :3] = 0
        for axis, (world, sign) in enumerate(parse_orientation(_AXES)):
            affine[world, axis] = sign * spacing.flat[axis]
        return Volume(array.reshape(SHAPE), affine)

    def read_masks(self, grid: Grid) -> tuple[dict[str, np.ndarray], list[str]]:
        masks, notes = {}, []
        for name in self.annotated:
            mask = np.zeros(int(np.prod(SHAPE)), dtype=bool)
            mask[_read(self.masks[name][0], 1)[0]] = True
            masks[name] = mask.reshape(SHAPE)
            if not mask.any():
                notes.append(f"case {self.name!r}: annotated, but without a voxel: {name}")
        return masks, notes


def _numbers(path: Path) -> np.ndarray:
    """Returns the numbers of a CSV file without a header.

    Raises:
        InputError: There is no such file, or it holds something else.
    """
    try:
        return np.loadtxt(path, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0][:120]
        raise InputError(f"the file cannot be read: {first}", where=str(path), hint="copy it again") from error


def _read(path: Path, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices and values of a sparse CSV file; the values are empty where there is one column.

    Raises:
        InputError: The file is damaged, or an index lies outside the volume.
    """
    try:
        with path.open(encoding="utf-8") as file:
            rows = [line.strip().split(",") for line in file][1:]  # the first line names the columns
        index = np.array([int(float(row[0])) for row in rows if row[0]], dtype=np.int64)
        values = np.array([float(row[1]) for row in rows if row[0]] if columns == 2 else [], dtype=np.float32)
    except (OSError, ValueError, OverflowError, IndexError) as error:
        first = (str(error).splitlines() or ["a row is too short"])[0][:120]
        raise InputError(f"the file cannot be read: {first}", where=str(path), hint="copy it again") from error
    if index.size and not (0 <= index.min() and index.max() < np.prod(SHAPE)):
        raise InputError(
            f"an index lies outside a volume of 128 × 128 × 128: {index.min() if index.min() < 0 else index.max()}",
            where=str(path),
            hint="copy it again",
        )
    if not np.isfinite(values).all():
        raise InputError("a value is NaN or infinite", where=str(path), hint="copy it again")
    return index, values
