"""The slices of a series that was read from a ZIP archive, for writers that read their headers again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from mome.errors import InputError
from mome.volumes.archives import is_archive, unpacked
from mome.volumes.dicom.source import SourceSlices
from mome.volumes.dicom_out.source_images import source_slices
from mome.volumes.mask_set import MaskSet


@contextlib.contextmanager
def readable_slices(masks: MaskSet, what: str) -> Iterator[SourceSlices]:
    """Gives the slices of the masks' scan, whose files can be read inside the block.

    The files of an archive are gone once it was read, so it is unpacked again. Members have the same names each time
    (`mome.volumes.archives`).

    Args:
        masks: The masks.
        what: The format in messages, as in "a DICOM SEG".

    Raises:
        InputError: The scan was not read from DICOM, or the archive is gone or has changed.
    """
    source = source_slices(masks, what)
    if masks.source is None or not is_archive(masks.source):
        yield source
        return
    with unpacked(masks.source) as inner:
        folder = inner.path if inner.path.is_dir() else inner.path.parent
        slices = [
            replace(image, header=replace(image.header, file=folder / image.header.file.name))
            for image in source.slices
        ]
        try:
            yield replace(source, slices=slices)
        except InputError as error:
            raise inner.renamed(error) from error
