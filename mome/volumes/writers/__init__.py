"""Mask writers by name. A new writer is one file here and one line below; `base.py` says what it must have.

`mome.volumes.writers.base.build_writer("nifti")` returns a writer. Listing the names imports no torch.
"""

from mome.registry import Registry

WRITERS = Registry("mask writer", "mome.volumes.writers", "mome.mask_writers")

WRITERS.register("nifti", "mome.volumes.writers.nifti:NiftiWriter", summary="NIfTI, label table in the header")
WRITERS.register(
    "dicom_seg",
    "mome.volumes.writers.dicom_seg:DicomSegWriter",
    summary="one DICOM SEG per scan; dicom_seg(kind=binary) for older archives",
    extra="dicom",
)
WRITERS.register(
    "rtstruct",
    "mome.volumes.writers.rtstruct:RtStructWriter",
    summary="one DICOM RT Structure Set per scan: contours on its slices",
    extra="dicom",
)
