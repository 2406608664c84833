"""Boundary loss (Kervadec et al. 2019, arXiv 1812.07032, equation 5)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from mome.errors import InputError
from mome.losses.masked import masked, mean_over_annotated


class BoundaryLoss(nn.Module):
    """The mean over voxels of p · φ, φ the signed distance to the structure's surface (arXiv 1812.07032, equation 5).

    The distance is negative inside.

    It is to be added to an overlap loss, as in `weighted_sum(losses=[bce_dice, boundary], weights=[1.0, 0.01])`. A
    patch without a voxel of the structure, or full of it, has no surface and adds nothing. Distances are computed on
    the CPU.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `boundary`.

        Args:
            spacing: Voxel size (D, H, W) in mm; distances are then in mm. The default counts voxels.
        """

        spacing: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])

    def __init__(self, config: Config) -> None:
        super().__init__()
        if len(config.spacing) != 3 or min(config.spacing) <= 0:
            raise InputError(
                f"loss boundary has a spacing of three positive numbers in mm, got {config.spacing}",
                hint="boundary(spacing=[2.0, 2.0, 2.0])",
            )
        self.spacing = tuple(config.spacing)

    def forward(self, logits: Tensor, targets: Tensor, supervised_BP: Tensor | None = None) -> Tensor:
        data = masked(logits, targets, supervised_BP)
        inside = (targets > 0.5).cpu().numpy()  # NumPy has no bfloat16
        distance = np.zeros(inside.shape, dtype=np.float32)
        for case, prompt in np.argwhere(data.mask_BP.cpu().numpy() > 0):
            distance[case, prompt] = signed_distance(inside[case, prompt], self.spacing)
        distance_BPV = torch.from_numpy(distance).to(logits.device).flatten(2)
        return mean_over_annotated((data.logits_BPV.sigmoid() * distance_BPV).mean(-1), data.mask_BP)


def signed_distance(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Returns the distance (D, H, W) of every voxel to the nearest voxel of the other kind, negative inside.

    Args:
        mask: Bool (D, H, W).
        spacing: Voxel size in mm.

    Returns:
        Zeros where the mask is empty or full.
    """
    if not mask.any() or mask.all():
        return np.zeros(mask.shape, dtype=np.float32)
    outside = ndimage.distance_transform_edt(~mask, sampling=spacing)
    within = ndimage.distance_transform_edt(mask, sampling=spacing)
    return (outside - within).astype(np.float32)
