"""Reading CT from DICOM with pydicom: headers, choice of a series, geometry of every slice, pixels.

`mome.volumes.read_volume` is the entry point. Positions and directions in this package are LPS mm, as in DICOM; the
volume that leaves it is RAS mm. Patients' names, dates and ids are never returned, logged or put into messages.
"""

from mome.volumes.dicom.options import DEFAULT_DICOM, DicomOptions

__all__ = ["DEFAULT_DICOM", "DicomOptions"]
