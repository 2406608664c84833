"""Plans a training from a fingerprint: voxel size, HU window, patch and batch for a given memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mome.data.fingerprint import Fingerprint
from mome.errors import InputError

# A patch shows at least this share of the median scan along each axis where the memory allows it; voxels are made
# larger for that. A segmenter that sees a small part of the body confuses organs. Our choice.
_LEAST_SHARE = 0.35
_LARGEST_VOXEL_MM = 6.0
_BATCH = 2  # patches per step where one patch fits the memory; nnU-Net's smallest


@dataclass(frozen=True)
class Plan:
    """Settings of a training.

    Attributes:
        spacing: Voxel size (x, y, z) of the network grid in mm.
        hu_window: (low, high) in HU.
        patch_size: Voxels of a patch.
        batch_size: Patches per step.
        bytes_per_voxel: Memory of a training step per patch voxel that was assumed.
    """

    spacing: tuple[float, ...]
    hu_window: tuple[float, float]
    patch_size: tuple[int, ...]
    batch_size: int
    bytes_per_voxel: float

    @property
    def step_bytes(self) -> float:
        """Memory of a training step in bytes, without weights and optimiser."""
        return self.bytes_per_voxel * math.prod(self.patch_size) * self.batch_size


def make_plan(found: Fingerprint, memory_bytes: float, bytes_per_voxel: float, divisor: Sequence[int]) -> Plan:
    """Chooses the settings.

    The voxel size along each axis is the median one. The patch has the proportions of the median scan and as many
    voxels as the memory allows; where it would show less than a third of the scan, voxels are made larger, up to 6 mm.
    The HU window holds 99 % of the annotated voxels, and fat and soft tissue.

    Args:
        found: The fingerprint.
        memory_bytes: Memory for a training step, without weights and optimiser.
        bytes_per_voxel: Memory of a training step per patch voxel; see `mome.training.memory`.
        divisor: The number by which the sides of a patch must be divisible, per axis.

    Raises:
        InputError: The memory does not suffice for the smallest patch.
    """
    extent = found.median_extent()
    spacing = list(found.median_spacing())
    voxels = memory_bytes / bytes_per_voxel / _BATCH
    smallest = math.prod(4 * side for side in divisor)
    if voxels < smallest:
        need = smallest * bytes_per_voxel * _BATCH
        raise InputError(
            f"the smallest patch needs {need / 1e9:.1f} GB for a step, and beside the weights "
            f"{max(memory_bytes, 0) / 1e9:.1f} GB are left",
            hint="more --memory, or a smaller preset",
        )
    # Voxels that a patch of the least share would have at this spacing, per axis.
    wanted = math.prod(_LEAST_SHARE * size / step for size, step in zip(extent, spacing, strict=True))
    if wanted > voxels:
        factor = (wanted / voxels) ** (1 / 3)
        spacing = [min(max(step * factor, step), max(_LARGEST_VOXEL_MM, step)) for step in spacing]
    sides = [size / step for size, step in zip(extent, spacing, strict=True)]
    scale = min(1.0, (voxels / math.prod(sides)) ** (1 / 3))
    patch = _rounded([side * scale for side in sides], voxels, divisor)
    low, high = found.hu_range()
    window = (float(math.floor(min(low, -160) / 10) * 10), float(math.ceil(max(high, 240) / 10) * 10))
    batch = max(_BATCH, min(8, int(memory_bytes / bytes_per_voxel / math.prod(patch))))
    return Plan(tuple(round(step, 3) for step in spacing), window, patch, batch, bytes_per_voxel)


def _rounded(sides: Sequence[float], voxels: float, divisor: Sequence[int]) -> tuple[int, ...]:
    """Returns sides that are multiples of the divisors, at least four of them, and fit into `voxels`."""
    patch = [max(4 * step, round(side / step) * step) for side, step in zip(sides, divisor, strict=True)]
    while math.prod(patch) > voxels:
        shrinkable = [axis for axis in range(3) if patch[axis] > 4 * divisor[axis]]
        if not shrinkable:
            break
        axis = max(shrinkable, key=lambda a: patch[a] / sides[a])
        patch[axis] -= divisor[axis]
    return tuple(patch)
