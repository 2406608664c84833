"""Masks as one DICOM SEG object per scan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mome.atomic import atomic_write
from mome.volumes.dicom_out.layers import layers_of
from mome.volumes.dicom_out.segmentation import make_segmentation
from mome.volumes.dicom_out.source_images import check_can_be_referred_to, check_is_series, empty_note, resampled_note
from mome.volumes.dicom_out.unpacked_source import readable_slices
from mome.volumes.grid import Volume
from mome.volumes.mask_set import MaskSet

_WHAT = "a DICOM SEG"


class DicomSegWriter:
    """Writes `<scan>_seg.dcm`, whose frames lie on the slices of the source series; see `MaskWriter`.

    Structures carry SNOMED CT codes with the side as a modifier, or private codes of the scheme 99MOME, and colours.
    The file refers to every source slice. Patient and study are copied from the source, nothing else is added. UIDs
    are new each time: archives take two objects with one UID for one, and drop the second.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """How structures are stored.

        Args:
            kind: `auto` writes a label map where no structures overlap, else bits per structure. `binary` always writes
                bits per structure, which older archives and viewers need.
        """

        kind: Literal["auto", "binary"] = "auto"

    ending: ClassVar[str] = "_seg.dcm"
    separate: ClassVar[bool] = False
    multilabel: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        self.kind = config.kind

    def check_source(self, source: Path | None) -> None:
        """Accepts DICOM series; see `MaskWriter.check_source`."""
        check_is_series(source, _WHAT)

    def check_volume(self, volume: Volume) -> None:
        """Accepts slices to which another file can refer; see `MaskWriter.check_volume`."""
        check_can_be_referred_to(volume, _WHAT)

    def write(self, path: Path, masks: MaskSet, *, multilabel: bool = False) -> list[str]:
        """Writes the masks; see `MaskWriter.write`.

        Args:
            path: The file.
            masks: The masks of a scan that was read from DICOM.
            multilabel: Smaller structures cover larger ones, so that nothing overlaps.

        Raises:
            InputError: The scan was not read from DICOM, or its headers cannot be referred to.
            OutputError: The file cannot be written.
        """
        with readable_slices(masks, _WHAT) as source:
            notes = resampled_note(masks, source)
            layers = layers_of(masks, source, flat=multilabel)
            several = len(layers.arrays) > 1
            if several and self.kind == "auto":
                notes.append(
                    f"{layers.overlap} voxels lie in more than one mask: the SEG holds bits per structure (BINARY), "
                    "because a label map has one structure per voxel"
                )
            notes += empty_note(layers.empty, "the SEG")
            made = make_segmentation(
                masks, source, layers.arrays, layers.members, binary=several or self.kind == "binary"
            )
        with atomic_write(path, "the DICOM SEG") as temporary:
            made.save_as(temporary, enforce_file_format=True)
        return notes
