"""Masks as NIfTI: a mask per structure, or one map of ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mome.volumes.grid import Volume
from mome.volumes.mask_file import write_mask
from mome.volumes.mask_set import MaskSet


class NiftiWriter:
    """Writes `.nii.gz` files on the scan's grid, with label table and scan's digest in the header; see `MaskWriter`.

    A mask holds 0 and 1, and its table names label 1; `table_id` keeps the id of the class table. A map of ids holds
    the ids themselves.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The writer has no settings."""

    ending: ClassVar[str] = ".nii.gz"
    separate: ClassVar[bool] = True
    multilabel: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        pass

    def check_source(self, source: Path | None) -> None:
        """Accepts every scan."""

    def check_volume(self, volume: Volume) -> None:
        """Accepts every scan."""

    def write(self, path: Path, masks: MaskSet, *, multilabel: bool = False) -> None:
        """Writes a mask or a map of ids; see `MaskWriter.write`."""
        if multilabel:
            write_mask(path, masks.flat.array, masks.grid, masks.header, masks.labels, scan=masks.scan)
            return
        (entry,) = masks.labels
        table = [{**entry, "id": 1, "table_id": entry["id"]}]
        write_mask(path, masks.boxed(entry["name"]), masks.grid, masks.header, table, scan=masks.scan)
