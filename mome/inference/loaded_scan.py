"""A scan that was read and brought to the network grid, so that it can be segmented without a wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mome.errors import InputError
from mome.inference.body_mask import BodyMask, body_mask
from mome.inference.scan_grid import scan_grid
from mome.inference.scan_tiles import tiles_of_scan
from mome.inference.stream import Box
from mome.volumes import Grid, Volume, checked_volume, read_volume
from mome.volumes.archives import is_archive, unpacked
from mome.volumes.dicom import DEFAULT_DICOM, DicomOptions
from mome.volumes.scan_digest import scan_digest

if TYPE_CHECKING:
    from mome.processing import MoMEProcessor


@dataclass
class LoadedScan:
    """A scan as the network needs it.

    Attributes:
        volume: The scan on its own grid, in HU.
        array: (1, 1, D, H, W), windowed HU in [0, 1] on the network grid.
        network: `whole`, or the part of it around the patient.
        whole: The network grid of the scan (`mome.inference.scan_grid`).
        digest: `mome.volumes.scan_digest.scan_digest` of the scan.
        body: Where the patient is; None where tiles are laid over the whole scan.
        seconds: Wall time of `read` and `resample` in seconds.
    """

    volume: Volume
    array: Tensor
    network: Grid
    whole: Grid
    digest: str = ""
    body: BodyMask | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Returns the bytes that reading such a scan takes: voxels, with those of checks, and network grid."""
        return reading_bytes(self.volume.array.nbytes, self.array.nbytes)

    @property
    def origin(self) -> tuple[int, int, int]:
        """Returns the first voxel (d, h, w) of `network` on the whole network grid."""
        if self.body is None:
            return 0, 0, 0
        d, h, w = (first for first, _ in self.body.box)
        return d, h, w

    @property
    def wanted(self) -> Callable[[Box], bool] | None:
        """Says of a tile of `network` whether it is computed; None where all are."""
        return tiles_of_scan(self.network, self.volume.grid) if self.body is None else self.body.wants


def reading_bytes(scan: int, network: int) -> int:
    """Returns the bytes that reading a scan takes, from those of its voxels and of its network grid.

    Checks take a quarter of the voxels beside them.
    """
    return scan * 5 // 4 + network


def load_scan(
    scan: str | Path | Volume,
    processor: MoMEProcessor,
    *,
    patch: tuple[int, int, int] | None = None,
    overlap: float | None = None,
    frame: int | None = None,
    dicom: DicomOptions = DEFAULT_DICOM,
    on_phase: Callable[[str], None] | None = None,
) -> LoadedScan:
    """Reads a scan and brings it to the network grid. It may run in another thread than the network.

    Args:
        scan: A file, a DICOM folder, a ZIP archive of one of them (see `mome.volumes.archives`), or a Volume in HU.
        processor: Decides the network grid and the window.
        patch: Voxels (D, H, W) of a tile, where only what is around the patient is kept (`mome.inference.body_mask`);
            None for the whole scan.
        overlap: The share of a tile that its neighbour covers too, which decides where tiles lie; None for the
            processor's.
        frame: The volume to take from a 4-D file, from 0.
        dicom: Which DICOM series is read and what is accepted.
        on_phase: Called with `read` and `resample` when that phase begins.

    Raises:
        InputError: The scan cannot be read, or its network grid is too large.
    """
    tell = on_phase or (lambda phase: None)
    tell("read")
    began = time.perf_counter()
    volume = checked_volume(scan) if isinstance(scan, Volume) else read_scan(Path(scan), frame, dicom)
    digest = scan_digest(volume.array)
    read = time.perf_counter()
    tell("resample")
    whole = scan_grid(volume, processor)
    overlap = processor.overlap if overlap is None else overlap
    body = None if patch is None else body_mask(volume, whole, patch, overlap)
    array, network = processor.to_network(volume, whole if body is None else body.grid)
    seconds = {"read": read - began, "resample": time.perf_counter() - read}
    return LoadedScan(volume, array, network, whole, digest, body, seconds)


def read_scan(scan: Path, frame: int | None, dicom: DicomOptions) -> Volume:
    """Reads a file, a DICOM folder or a ZIP archive of one of them; see `load_scan`.

    Raises:
        InputError: It cannot be read.
    """
    if not is_archive(scan):
        return read_volume(scan, frame=frame, dicom=dicom)
    with unpacked(scan) as inner:
        try:
            volume = read_volume(inner.path, frame=frame, dicom=dicom)
        except InputError as error:
            raise inner.renamed(error) from error
    return replace(volume, notes=(*volume.notes, *inner.notes))
