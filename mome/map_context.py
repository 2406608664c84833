"""The context of a map: its place in the volume, and the prompt. Routers and experts may read it beside the values."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class MapContext:
    """The place of a map, and the prompts where a part reads them.

    Attributes:
        origin_B3: int64, the voxel of the network grid at which each patch of the batch begins; None where it is not
            known (then it is voxel 0).
        stride: Voxels of the network grid per voxel of the map, along D, H, W.
        text_BT: One text row per map of the batch, only for parts that read prompts.
    """

    origin_B3: Tensor | None = None
    stride: tuple[int, int, int] = (1, 1, 1)
    text_BT: Tensor | None = None

    def with_stride(self, stride: tuple[int, int, int]) -> MapContext:
        """Returns a copy with another stride."""
        return replace(self, stride=stride)


# A map that begins at voxel 0 and has the resolution of the network grid.
DEFAULT_CONTEXT = MapContext()
