"""Volumes: an array with its affine, readers and writers, resampling by affine. Knows nothing of the model."""

from mome.volumes.check import checked_volume
from mome.volumes.grid import Grid, Volume, network_grid
from mome.volumes.read import read_volume
from mome.volumes.resample import resample
from mome.volumes.write import read_label_table, write_mask

__all__ = [
    "Grid",
    "Volume",
    "checked_volume",
    "network_grid",
    "read_label_table",
    "read_volume",
    "resample",
    "write_mask",
]
