"""The scan of a job as NIfTI, for programs that do not read the uploaded format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from mome.atomic import atomic_write

if TYPE_CHECKING:
    from mome.volumes import Volume


def write_image(volume: Volume, path: Path) -> Path:
    """Writes a scan in whole HU on its own grid and returns the path.

    Args:
        volume: The scan in HU.
        path: The file to write, `.nii.gz`.

    Raises:
        OutputError: The file cannot be written.
    """
    image = nib.Nifti1Image(np.clip(np.rint(volume.array), -32768, 32767).astype(np.int16), volume.affine)
    image.header.set_xyzt_units("mm")
    with atomic_write(path, "the image") as temporary:
        nib.save(image, temporary)
    return path
