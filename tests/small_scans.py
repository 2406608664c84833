"""A small synthetic patient, and its scan in the formats that are read."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

SHAPE, SPACING = (24, 22, 20), (8.0, 9.0, 10.0)


def patient_hu() -> np.ndarray:
    """Returns int16 (i, j, k) HU: air around a body of soft tissue with two lungs and a bone."""
    rng = np.random.default_rng(0)
    at = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    hu = np.full(SHAPE, -1000.0)
    hu[(at[0] ** 2 + at[1] ** 2) < 0.7] = 45
    for side in (-0.4, 0.4):
        hu[((at[0] - side) ** 2 + at[1] ** 2 + at[2] ** 2) < 0.06] = -850
    hu[(at[0] ** 2 + (at[1] + 0.5) ** 2) < 0.02] = 500
    return np.round(hu + rng.normal(0, 12, SHAPE)).astype(np.int16)


def patient_affine() -> np.ndarray:
    """Returns the affine of the patient, axes to the right, anterior and superior."""
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = (-90, -95, -60)
    return affine


def patient_image(array: np.ndarray | None = None, affine: np.ndarray | None = None) -> nib.Nifti1Image:
    """Returns the scan as nibabel image, with sform = qform of code 1, in mm."""
    image = nib.Nifti1Image(patient_hu() if array is None else array, patient_affine() if affine is None else affine)
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    image.header.set_xyzt_units("mm")
    return image


def patient_bytes(array: np.ndarray | None = None, **fields: Any) -> bytes:
    """Returns the scan as an uncompressed NIfTI file, with header fields replaced.

    Args:
        array: Other voxels.
        fields: Field of the NIfTI-1 header → value.
    """
    data = bytearray(patient_image(array).to_bytes())
    header = np.frombuffer(bytes(data[:348]), nib.nifti1.header_dtype).copy()
    for name, value in fields.items():
        header[name] = value
    data[:348] = header.tobytes()
    return bytes(data)


def save_patient(path: Path, array: np.ndarray | None = None, **fields: Any) -> Path:
    """Writes the scan as `.nii` or `.nii.gz`, with header fields replaced; see `patient_bytes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = patient_bytes(array, **fields)
    path.write_bytes(gzip.compress(data, 1) if path.name.lower().endswith(".gz") else data)
    return path


def nrrd_text(**fields: str | None) -> str:
    """Returns a header of the scan as NRRD, with fields replaced; a field that is None is left out."""
    shape = " ".join(map(str, SHAPE))
    rows: dict[str, str | None] = {
        "type": "short",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": shape,
        "space directions": f"({-SPACING[0]},0,0) (0,{-SPACING[1]},0) (0,0,{SPACING[2]})",
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "raw",
        "space origin": "(90,95,-60)",
        **{name.replace("_", " "): value for name, value in fields.items()},
    }
    return "NRRD0004\n" + "".join(f"{name}: {value}\n" for name, value in rows.items() if value is not None)


def save_nrrd(path: Path, array: np.ndarray | None = None, **fields: str | None) -> Path:
    """Writes the scan as `.nrrd` with its voxels behind the header; see `nrrd_text`."""
    voxels = (patient_hu() if array is None else array).tobytes(order="F")
    path.write_bytes(nrrd_text(**fields).encode() + b"\n" + voxels)
    return path


def mha_text(**fields: str | None) -> str:
    """Returns a header of the scan as MetaImage, with fields replaced; a field that is None is left out."""
    rows: dict[str, str | None] = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": "-1 0 0 0 -1 0 0 0 1",
        "Offset": "90 95 -60",
        "ElementSpacing": " ".join(map(str, SPACING)),
        "DimSize": " ".join(map(str, SHAPE)),
        "ElementType": "MET_SHORT",
        **fields,
    }
    last = rows.pop("ElementDataFile", None) or "LOCAL"
    lines = [f"{name} = {value}\n" for name, value in rows.items() if value is not None]
    return "".join([*lines, f"ElementDataFile = {last}\n"])


def save_mha(path: Path, array: np.ndarray | None = None, **fields: str | None) -> Path:
    """Writes the scan as `.mha` with its voxels behind the header; see `mha_text`."""
    path.write_bytes(mha_text(**fields).encode() + (patient_hu() if array is None else array).tobytes(order="F"))
    return path


def large_body(side: int = 120) -> np.ndarray:
    """Returns int16 (side, side, side) HU: a block of soft tissue in air, which takes a while to segment."""
    hu = np.full((side, side, side), -1000, np.int16)
    hu[2:-2, 2:-2, 2:-2] = 40
    return hu


def correct_mask(path: Path) -> bytes:
    """Changes a mask as somebody who corrects it does, and returns the new bytes of the file."""
    image = nib.load(path)
    corrected = np.asarray(image.dataobj).copy()
    corrected[:4] = 1
    nib.save(nib.Nifti1Image(corrected, image.affine, image.header), path)
    return path.read_bytes()
