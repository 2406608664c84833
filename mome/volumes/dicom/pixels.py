"""Pixels of slices as HU: decoding, padding, and the rescale slope and intercept of each slice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mome.errors import InputError
from mome.volumes.dicom.bits import foreign_bits, stored_values
from mome.volumes.dicom.bounded import BoundedFile
from mome.volumes.dicom.decoder import DecoderProcess, choose_plugin
from mome.volumes.dicom.elements import integer, printable
from mome.volumes.dicom.planes import AIR
from mome.volumes.dicom.quiet import quiet_decoders
from mome.volumes.dicom.slices import Slice

# Transfer syntax UID → the packages that decode it.
_PACKAGES = {
    "1.2.840.10008.1.2.4.50": "python-gdcm",
    "1.2.840.10008.1.2.4.51": "python-gdcm",
    "1.2.840.10008.1.2.4.57": "python-gdcm",
    "1.2.840.10008.1.2.4.70": "python-gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.91": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.201": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg pylibjpeg-openjpeg",
}
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
# pydicom decodes RLE itself, in Python.
_RLE = "1.2.840.10008.1.2.5"


def read_pixels(slices: Sequence[Slice]) -> tuple[np.ndarray, dict[int, str], int, int]:
    """Decodes slices of one size.

    Args:
        slices: Each file is opened once; frames of a multi-frame file may come in any order.

    Returns:
        HU (slices, rows, columns) as float32; index of each damaged slice → what is wrong with it; the number of
        pixels that held the padding value and are air now; the number of pixels with bits that belong to no value.

    Raises:
        InputError: The package that decodes the pixels is not installed, or HighBit contradicts the pixels.
    """
    header = slices[0].header
    array = np.empty((len(slices), header.rows, header.columns), dtype=np.float32)
    by_file: dict[Path, list[int]] = {}
    for index, image in enumerate(slices):
        by_file.setdefault(image.header.file, []).append(index)
    damaged: dict[int, str] = {}
    padded = foreign = 0
    with DecoderProcess((header.rows, header.columns)) as process, quiet_decoders():
        for indices in by_file.values():
            done = 0
            try:
                frames = _decoded([slices[index] for index in indices], process)
                for index, stored in zip(indices, frames, strict=True):
                    counts = _store_hu(array[index], stored, slices[index])
                    padded, foreign = padded + counts[0], foreign + counts[1]
                    done += 1
            except InputError:
                raise
            except Exception:  # pydicom raises errors of many types for damaged data
                damaged.update(dict.fromkeys(indices[done:], "truncated or damaged pixels"))
    return array, damaged, padded, foreign


def _store_hu(out: np.ndarray, stored: tuple[np.ndarray, np.ndarray], image: Slice) -> tuple[int, int]:
    """Writes HU into `out` and returns the numbers of padded pixels and of pixels with bits that belong to no value.

    Args:
        out: (rows, columns) float32.
        stored: The values before and after unused bits are removed; the padding value may use these bits.
        image: The slice, with its slope and intercept.
    """
    raw, values = stored
    if values.shape != out.shape:
        raise ValueError(f"the pixels have shape {values.shape}, the header says {out.shape}")
    out[:] = values
    out *= 1.0 if image.slope is None else image.slope
    out += image.intercept or 0.0
    padding = np.zeros(out.shape, dtype=bool)
    if image.header.padding is not None:
        low, high = image.header.padding
        padding = ((raw >= low) & (raw <= high)) | ((values >= low) & (values <= high))
        out[padding] = AIR
    foreign = 0 if raw is values else foreign_bits(raw[~padding], image.header.bits)
    return int(padding.sum()), foreign


def _decoded(slices: Sequence[Slice], process: DecoderProcess) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the stored values of slices of one file, before and after unused bits are removed."""
    import pydicom

    file, frames = slices[0].header.file, [image.frame for image in slices]
    bits = slices[0].header.bits
    with BoundedFile(file) as opened:
        dataset = pydicom.dcmread(opened, force=True)
    syntax = _transfer_syntax(dataset)
    decoder = _decoder(syntax, dataset, file)
    if syntax.is_encapsulated and str(syntax) != _RLE:
        if bits[2] + 1 != bits[1]:
            raise InputError(
                f"the pixels are compressed, and HighBit {bits[2]} contradicts BitsStored {bits[1]}",
                where=str(file),
                hint="export the series again, uncompressed",
            )
        for values in process.decode(file, frames, choose_plugin(decoder.available_plugins)):
            yield values, values
        return
    for raw, _ in decoder.iter_array(dataset, indices=frames, raw=True, correct_unused_bits=False):
        yield raw, stored_values(raw, bits, dataset, file)


def _decoder(syntax: Any, dataset: Any, file: Path) -> Any:
    """Returns pydicom's decoder of a transfer syntax.

    Raises:
        InputError: pydicom knows none, or the package that it needs is not installed.
    """
    from pydicom.pixels import get_decoder

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise InputError(
            f"the pixels are compressed as {printable(syntax.name)}, which cannot be decoded",
            where=str(file),
            hint="convert the series to uncompressed DICOM",
        ) from error
    package = _PACKAGES.get(str(syntax), "pylibjpeg")
    is_available = decoder.is_available
    if str(syntax) == _JPEG_EXTENDED and (integer(dataset, "BitsStored") or 8) > 8:
        # gdcm and Pillow decode only 8 bits. The package that decodes 12 has another licence, so no extra installs it.
        is_available, package = "pylibjpeg" in decoder.available_plugins, "pylibjpeg-libjpeg (GPL)"
    if not is_available:
        raise InputError(
            f"the pixels are compressed as {syntax.name}, and the package that decodes them is not installed",
            where=str(file),
            hint=f'pip install "mome[dicom]", or pip install {package}',
        )
    return decoder


def _transfer_syntax(dataset: Any) -> Any:
    """Returns the transfer syntax, or the one the file was read as where it has no file meta information."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    syntax = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if syntax:
        return syntax
    is_implicit, is_little = dataset.original_encoding
    if is_implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
