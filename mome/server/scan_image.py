"""The scan of a job as NIfTI, for viewers that do not read the uploaded format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from mome.atomic import atomic_write
from mome.volumes import read_volume

if TYPE_CHECKING:
    from mome.inference.result import Segmentation


def write_image(result: Segmentation, scan: Path, path: Path, **options: Any) -> Path:
    """Writes the scan in whole HU on its own grid and returns the path.

    Args:
        result: The masks, whose grid the image must have.
        scan: The file or folder.
        path: The file to write, `.nii.gz`.
        options: `frame` and `dicom` of `mome.volumes.read_volume`.

    Raises:
        InputError: The scan cannot be read.
        OutputError: The file cannot be written.
    """
    volume = read_volume(scan, **options)
    assert volume.grid.same_as(result.grid), "the scan was read twice and its grids differ"
    hu = np.clip(np.rint(volume.array), -32768, 32767).astype(np.int16)
    image = nib.Nifti1Image(hu, volume.affine)
    image.header.set_xyzt_units("mm")
    with atomic_write(path, "the image") as temporary:
        nib.save(image, temporary)
    return path
