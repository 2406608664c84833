"""The error for a DICOM file that cannot be read."""


class DamagedFile(Exception):
    """A file that cannot be read; the message is the reason."""
