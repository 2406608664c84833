"""Checks of a scan before it is cached for training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mome.errors import InputError


def check_image(hu: np.ndarray, case: str, where: Path) -> None:
    """Checks that a scan shows something.

    Raises:
        InputError: All voxels have one value, as where all were NaN.
    """
    if hu.min() == hu.max():
        raise InputError(
            f"all voxels of case {case!r} have one value, {float(hu.flat[0]):g} HU (NaN is read as air)",
            where=str(where),
            hint="convert the scan again, or leave the case out",
        )
