"""What a user may ask of the DICOM reader."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DicomOptions:
    """Options of the DICOM reader; they change nothing for other formats.

    Attributes:
        series: The series to read, where a folder holds several: its number in the list of `mome info FOLDER`, its
            SeriesInstanceUID, or `largest` for the CT with the most slices.
        allow_gaps: Read a series with gaps that could hide a structure. The volume is air (−1024 HU) in such a gap.
        allow_damaged: Leave out slices that are truncated or damaged, instead of refusing the series.
    """

    series: str | int | None = None
    allow_gaps: bool = False
    allow_damaged: bool = False


DEFAULT_DICOM = DicomOptions()
"""The only series of a folder, without large gaps and without damaged slices."""
