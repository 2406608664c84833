"""Average pooling of maps in every precision."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F


def average_pool(map_BCDHW: Tensor, kernel: Any, stride: Any) -> Tensor:
    """Means over blocks of voxels: (B, C, D, H, W) → (B, C, D', H', W') in the type of the map.

    PyTorch has no average pooling of 16-bit numbers on the CPU, so there it runs in float32.

    Args:
        map_BCDHW: The map.
        kernel: Sides of the blocks.
        stride: Steps between them.
    """
    if map_BCDHW.device.type == "cpu" and map_BCDHW.element_size() == 2:
        return F.avg_pool3d(map_BCDHW.float(), kernel, stride).to(map_BCDHW.dtype)
    return F.avg_pool3d(map_BCDHW, kernel, stride)
