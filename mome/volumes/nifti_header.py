"""The header of a NIfTI file, checked before a voxel is read. Source: nifti1.h and nifti2.h of the NIfTI group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mome.errors import InputError
from mome.volumes.not_ct import intent_not_ct, intent_note
from mome.volumes.sizes import check_size
from mome.volumes.streams import Readable

# Data type codes; 128 and 2304 are colours, 32, 1792 and 2048 complex numbers, 1536 is float128.
_TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_COLOURS = (128, 2304)
# The fields that say where voxels are. Masks get them as they are.
_SCALARS = (
    "sform_code", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
)  # fmt: skip
_MOST_EXTENSION_BYTES = 1 << 26


@dataclass(frozen=True)
class NiftiHeader:
    """The content of a NIfTI header that reading needs.

    Attributes:
        shape: Voxels along all axes, two to seven.
        dtype: The type of the stored numbers, with its byte order.
        offset: Byte at which the voxels begin.
        slope, intercept: The value of a voxel is `slope` × number + `intercept`.
        transforms: The fields that say where voxels are, as they are stored; see `mome.volumes.nifti_transforms`.
        size: Bytes of the header, 348 or 540.
        byte_order: "<" or ">".
        notes: Sentences for the user.
        not_ct: What the intent code says that the file is, where that is no CT; None otherwise.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    slope: float
    intercept: float
    transforms: dict[str, Any]
    size: int
    byte_order: str
    notes: tuple[str, ...]
    not_ct: str | None

    @property
    def voxel_bytes(self) -> int:
        """Returns the bytes of all voxels."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_nifti_header(stream: Readable, path: Path) -> NiftiHeader:
    """Reads a header from the start of a stream; the stream then stands at the byte after the header.

    Raises:
        InputError: The stream holds no NIfTI header, its voxels lie in another file, its numbers are colours or
            complex, or a field has a value that it cannot have.
    """
    start = stream.read(4)
    orders: tuple[Literal["<", ">"], ...] = ("<", ">")
    sizes = {(order, size): np.array(size, order + "i4").tobytes() for order in orders for size in (348, 540)}
    found = next((key for key, content in sizes.items() if content == start), None)
    if found is None:
        raise _not_nifti(path)
    order, size = found
    rest = stream.read(size - 4)
    if len(rest) < size - 4:
        raise EOFError("the header ends early")
    from nibabel.nifti1 import header_dtype as first_version
    from nibabel.nifti2 import header_dtype as second_version

    block = np.frombuffer(start + rest, (first_version if size == 348 else second_version).newbyteorder(order))[0]
    _check_magic(bytes(block["magic"]), size, path)
    code = int(block["datatype"])
    if code in _COLOURS:
        raise InputError("this is a colour image, not a CT", where=str(path), hint="give a volume in HU")
    if code not in _TYPES:
        raise InputError(
            f"the numbers of this file are of NIfTI type {code}, which is no type of a CT",
            where=str(path),
            hint="convert it to int16 or float32",
        )
    shape = _shape(block, path)
    offset = _offset(block, size, path)
    slope, intercept, notes = _scaling(block, path)
    transforms: dict[str, Any] = {name: block[name].item() for name in _SCALARS}
    transforms["pixdim"] = [float(value) for value in block["pixdim"][:4]]
    transforms["xyzt_units"] = int(block["xyzt_units"])
    for row in "xyz":
        transforms[f"srow_{row}"] = [float(value) for value in block[f"srow_{row}"]]
    dtype = np.dtype(_TYPES[code]).newbyteorder(order)
    intent, name = int(block["intent_code"]), bytes(block["intent_name"]).split(b"\0")[0].decode("ascii", "replace")
    not_ct = intent_not_ct(intent)
    if not_ct is None and (said := intent_note(intent, name)):
        notes = (*notes, said)
    if int(block["bitpix"]) not in (0, 8 * dtype.itemsize):
        notes = (*notes, f"the header's bitpix is {int(block['bitpix'])}, its data type has {8 * dtype.itemsize} bits")
    if offset % 16:
        notes = (*notes, f"the header's vox_offset is {offset}, which is no multiple of 16: are its voxels there?")
    return NiftiHeader(shape, dtype, offset, slope, intercept, transforms, size, order, notes, not_ct)


def read_extensions(stream: Readable, header: NiftiHeader, path: Path) -> list[tuple[int, bytes]]:
    """Returns the header's extensions as (code, content), from a stream that stands at the byte after the header.

    Raises:
        InputError: An extension has a size that it cannot have.
    """
    flag = stream.read(4)
    left = header.offset - header.size - 4
    extensions: list[tuple[int, bytes]] = []
    if len(flag) < 4 or flag[0] == 0:
        return extensions
    while left >= 16:
        size, code = (int(value) for value in np.frombuffer(stream.read(8).ljust(8, b"\0"), header.byte_order + "i4"))
        if size == 0 and code == 0:
            break  # zeros after the last extension are padding
        if size < 16 or size > min(left, _MOST_EXTENSION_BYTES):
            raise InputError("an extension of the header is damaged", where=str(path), hint="copy the file again")
        content = stream.read(size - 8)
        if len(content) < size - 8:
            raise InputError("the file is truncated or damaged", where=str(path), hint="copy it again")
        extensions.append((code, content))
        left -= size
    return extensions


def _check_magic(magic: bytes, size: int, path: Path) -> None:
    if magic.startswith((b"ni1", b"ni2")):
        raise InputError(
            "the voxels of this header lie in an .img file, which is not read",
            where=str(path),
            hint="convert the pair to one .nii.gz file",
        )
    if not magic.startswith(b"n+1" if size == 348 else b"n+2"):
        raise _not_nifti(path)


def _not_nifti(path: Path) -> InputError:
    return InputError("not a NIfTI file", where=str(path), hint="is it named .nii by mistake?")


def _shape(block: Any, path: Path) -> tuple[int, ...]:
    dimensions = [int(value) for value in block["dim"]]
    if not 1 <= dimensions[0] <= 7 or min(dimensions[1 : dimensions[0] + 1]) < 1:
        raise InputError(
            f"the header's dim is {dimensions}: its first number is 1 to 7, and as many sizes above 0 follow",
            where=str(path),
            hint="convert the scan again from its DICOM series",
        )
    shape = tuple(dimensions[1 : dimensions[0] + 1])
    check_size(shape, where=str(path))
    return shape


def _offset(block: Any, size: int, path: Path) -> int:
    offset = float(block["vox_offset"])
    first = size + 4
    if offset == 0:
        return first  # the NIfTI library reads 0 like this
    if not first <= offset <= 2**40 or offset != int(offset):
        raise InputError(
            f"the header's vox_offset is {offset:g}; voxels begin at byte {first} or later",
            where=str(path),
            hint="convert the scan again from its DICOM series",
        )
    return int(offset)


def _scaling(block: Any, path: Path) -> tuple[float, float, tuple[str, ...]]:
    slope, intercept = float(block["scl_slope"]), float(block["scl_inter"])
    if slope == 0 or math.isnan(slope):
        # Both mean "no scaling".
        unused = math.isfinite(intercept) and intercept != 0
        said = f"the header's scl_slope is {slope:g}, so its scl_inter of {intercept:g} is not used"
        return 1.0, 0.0, (said,) if unused else ()
    if math.isinf(slope):
        return 1.0, 0.0, ("the header's scl_slope is infinite; numbers are taken as they are stored",)
    if not math.isfinite(intercept):
        raise InputError(
            f"the header's scl_inter is {intercept}",
            where=str(path),
            hint="convert the scan again from its DICOM series",
        )
    return slope, intercept, ()
