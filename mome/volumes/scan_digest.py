"""A digest of a scan's numbers, by which a mask says which scan it is of."""

from __future__ import annotations

import hashlib

import numpy as np

_DIGITS = 16


def scan_digest(hu: np.ndarray) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of a scan's shape and HU (about 0.7 s per GB).

    It is the same wherever the file lies, whatever its format is, and in whichever order the voxels are in memory.

    Args:
        hu: (i, j, k) of HU; they are compared as 32-bit floating-point numbers.
    """
    digest = hashlib.sha256(str(tuple(hu.shape)).encode())
    for plane in hu:  # plane by plane: a plane may have to be copied
        digest.update(np.ascontiguousarray(plane, dtype="<f4").data)
    return digest.hexdigest()[:_DIGITS]
