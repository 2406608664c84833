"""Mask writers by name. A new writer is one file here and one line below; `base.py` says what it must have.

`WRITERS.build("nifti")` returns a writer. Listing the names imports no torch.
"""

from mome.registry import Registry

WRITERS = Registry("mask writer", "mome.volumes.writers", "mome.mask_writers")

WRITERS.register("nifti", "mome.volumes.writers.nifti:NiftiWriter", summary="NIfTI, label table in the header")
