"""Volumes: arrays with affines, readers and mask writers, resampling by affine. Knows nothing of the model.

Attributes are imported on first use, so that `mome.volumes.scan_files` and the other light modules load no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "WRITERS": "mome.volumes.writers",
    "Grid": "mome.volumes.grid",
    "Volume": "mome.volumes.grid",
    "checked_volume": "mome.volumes.check",
    "network_grid": "mome.volumes.grid",
    "read_label_map": "mome.volumes.label_map",
    "read_label_table": "mome.volumes.mask_file",
    "read_volume": "mome.volumes.read",
    "resample": "mome.volumes.resampling",
    "write_mask": "mome.volumes.mask_file",
}
__all__ = [
    "WRITERS",
    "Grid",
    "Volume",
    "checked_volume",
    "network_grid",
    "read_label_map",
    "read_label_table",
    "read_volume",
    "resample",
    "write_mask",
]

if TYPE_CHECKING:
    from mome.volumes.check import checked_volume
    from mome.volumes.grid import Grid, Volume, network_grid
    from mome.volumes.label_map import read_label_map
    from mome.volumes.mask_file import read_label_table, write_mask
    from mome.volumes.read import read_volume
    from mome.volumes.resampling import resample
    from mome.volumes.writers import WRITERS


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mome.volumes' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
