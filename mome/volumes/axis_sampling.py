"""Where the voxel centres of one grid lie on another grid whose axes are parallel to its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mome.volumes.grid import Grid


@dataclass(frozen=True)
class AxisSampling:
    """The positions of the voxel centres of one target axis on the source axis that it is parallel to.

    Attributes:
        source_axis: The source axis.
        size: Voxels of the source along that axis.
        step: Source voxels per target voxel; negative where the axes run in opposite directions.
        at: (n,) float64, positions in source voxels, moved to the outer voxel centres where they lie beyond them.
        outside: (n,) bool, where a position lies more than half a voxel beyond the outer voxel centres.
    """

    source_axis: int
    size: int
    step: float
    at: np.ndarray
    outside: np.ndarray

    @property
    def low(self) -> np.ndarray:
        """Returns the source voxels (n,) at or before the positions, int64."""
        return np.minimum(np.floor(self.at).astype(np.int64), self.size - 1)

    @property
    def high(self) -> np.ndarray:
        """Returns the source voxels (n,) after those of `low`, int64; the last one has none after it."""
        return np.minimum(self.low + 1, self.size - 1)

    @property
    def weight(self) -> np.ndarray:
        """Returns the share (n,) of `high` in a linear interpolation; that of `low` is the rest."""
        return self.at - self.low


def parallel_axes(source: Grid, target: Grid) -> list[AxisSampling] | None:
    """Returns the sampling of every target axis, or None where the grids are oblique to each other."""
    target_to_source = np.linalg.inv(source.affine) @ target.affine
    order = [int(np.argmax(np.abs(target_to_source[:3, axis]))) for axis in range(3)]
    rest = np.abs(target_to_source[:3, :3]).copy()
    for axis, source_axis in enumerate(order):
        rest[source_axis, axis] = 0
    # Headers in float32 leave errors of about 1e-5 voxels per voxel.
    if sorted(order) != [0, 1, 2] or rest.max() >= 1e-5:
        return None
    samplings = []
    for axis, source_axis in enumerate(order):
        step, size = float(target_to_source[source_axis, axis]), source.shape[source_axis]
        at = target_to_source[source_axis, 3] + step * np.arange(target.shape[axis])
        # Rounded headers must not turn an exact copy into an interpolation.
        at = np.where(np.abs(at - np.round(at)) < 1e-3, np.round(at), at)
        outside = (at < -0.5) | (at > size - 0.5)
        samplings.append(AxisSampling(source_axis, size, step, np.clip(at, 0, size - 1), outside))
    return samplings
