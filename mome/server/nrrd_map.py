"""A map of ids as NRRD, which 3D Slicer and OHIF read: 1 is the first structure, 2 the second, and so on."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mome.atomic import atomic_write

if TYPE_CHECKING:
    from mome.inference.result import Segmentation


def write_nrrd_map(result: Segmentation, path: Path, *, compress: bool = False) -> Path:
    """Writes the masks as one map on the scan's grid and returns its path.

    The ids are the places of the prompts from 1, because both programs number segments so. Smaller structures are
    written over larger ones. The space is LPS in mm; a shear of a tilted scan stays in the directions.

    Args:
        result: The masks.
        path: The file.
        compress: Compress the voxels by gzip. OHIF reads raw voxels only.

    Raises:
        OutputError: The file cannot be written.
    """
    names = [prompt.name for prompt in result.prompts]
    array = np.zeros(result.grid.shape, dtype=np.uint8 if len(names) < 256 else np.uint16)
    for name in sorted(names, key=lambda name: -result.masks.voxels[name]):
        array[result.masks[name].view(bool)] = names.index(name) + 1
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ result.grid.affine
    directions = " ".join(f"({','.join(repr(float(v)) for v in lps[:3, axis])})" for axis in range(3))
    lines = [
        "NRRD0004",
        f"type: {'uint8' if array.dtype == np.uint8 else 'uint16'}",
        "dimension: 3",
        "space: left-posterior-superior",
        f"sizes: {' '.join(map(str, array.shape))}",
        f"space directions: {directions}",
        "kinds: domain domain domain",
        "endian: little",
        f"encoding: {'gzip' if compress else 'raw'}",
        f"space origin: ({','.join(repr(float(v)) for v in lps[:3, 3])})",
    ]
    voxels = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes(order="F")
    with atomic_write(path, "the map") as temporary, open(temporary, "wb") as file:
        file.write(("\n".join(lines) + "\n\n").encode("ascii"))
        file.write(gzip.compress(voxels, 1) if compress else voxels)
    return path
