"""Masks as one DICOM RT Structure Set per scan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mome.atomic import atomic_write
from mome.volumes.dicom.quiet import quiet_decoders
from mome.volumes.dicom_out.source_images import check_can_be_referred_to, check_is_series, empty_note, resampled_note
from mome.volumes.dicom_out.structure_set import make_structure_set
from mome.volumes.dicom_out.unpacked_source import readable_slices
from mome.volumes.grid import Volume
from mome.volumes.mask_set import MaskSet

_WHAT = "an RT Structure Set"


class RtStructWriter:
    """Writes `<scan>_rtstruct.dcm`: contours of every structure on the slices of the source series; see `MaskWriter`.

    Holes are joined to their outline by the keyhole technique (`mome.volumes.dicom_out.contours`). Structures may
    overlap. On a tilted series the contours lie in the tilted planes, which some planning systems refuse.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The writer has no settings."""

    ending: ClassVar[str] = "_rtstruct.dcm"
    separate: ClassVar[bool] = False
    multilabel: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        pass

    def check_source(self, source: Path | None) -> None:
        """Accepts DICOM series; see `MaskWriter.check_source`."""
        check_is_series(source, _WHAT)

    def check_volume(self, volume: Volume) -> None:
        """Accepts slices to which another file can refer; see `MaskWriter.check_volume`."""
        check_can_be_referred_to(volume, _WHAT)

    def write(self, path: Path, masks: MaskSet, *, multilabel: bool = False) -> list[str]:
        """Writes the contours; see `MaskWriter.write`.

        Raises:
            InputError: The scan was not read from DICOM, or its headers cannot be referred to.
            OutputError: The file cannot be written.
        """
        with readable_slices(masks, _WHAT) as source:
            made = make_structure_set(masks, source)
        with atomic_write(path, "the RT Structure Set") as temporary, quiet_decoders():
            made.save_as(temporary, implicit_vr=True, little_endian=True, enforce_file_format=True)
        drawn = zip(masks.labels, made.ROIContourSequence, strict=True)
        lost = [entry["name"] for entry, contour in drawn if "ContourSequence" not in contour]
        lost = [name for name in lost if masks.voxels[name]]
        return [*resampled_note(masks, source), *empty_note(lost, "the structure set")]
