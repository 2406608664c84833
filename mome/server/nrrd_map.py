"""A map of ids as NRRD, which 3D Slicer and OHIF read."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mome.atomic import atomic_write
from mome.errors import InputError

if TYPE_CHECKING:
    from mome.inference.result import Segmentation

ID_TYPES = ("uint8", "uint16")


def map_ids(names: Sequence[str], known: Mapping[str, int]) -> dict[str, int]:
    """Returns the ids of structures.

    Args:
        names: The structures.
        known: Ids that some of them have already. Others get the ids after these, in their order: 1, 2, … where none
            is known.
    """
    others = itertools.count(max(known.values(), default=0) + 1)
    return {name: known[name] if name in known else next(others) for name in names}


def write_nrrd_map(
    result: Segmentation,
    path: Path,
    *,
    compress: bool = False,
    dtype: str | None = None,
    known_ids: Mapping[str, int] | None = None,
) -> Path:
    """Writes the masks as one map on the scan's grid and returns its path.

    Smaller structures are written over larger ones. The space is LPS in mm; a shear of a tilted scan stays in the
    directions.

    Args:
        result: The masks.
        path: The file.
        compress: Compress the voxels by gzip. OHIF reads raw voxels only.
        dtype: One of `ID_TYPES`; None for the smaller one that holds the ids.
        known_ids: See `map_ids`.

    Raises:
        InputError: An id does not fit into the type.
        OutputError: The file cannot be written.
    """
    ids = map_ids([prompt.name for prompt in result.prompts], known_ids or {})
    largest = max(ids.values())
    dtype = dtype or ("uint8" if largest < 256 else "uint16")
    if largest > np.iinfo(dtype).max:
        raise InputError(f"the id {largest} does not fit into {dtype}", where="result_dtype", hint=ID_TYPES[-1])
    array = result.label_map(ids)[0].astype(dtype, copy=False)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ result.grid.affine
    directions = " ".join(f"({','.join(repr(float(v)) for v in lps[:3, axis])})" for axis in range(3))
    lines = [
        "NRRD0004",
        f"type: {dtype}",
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
