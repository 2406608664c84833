"""The context of a map: its place in the volume, and the prompt. Routers and experts may read both beside the map."""

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
        label_B: int64, the label whose stored text row is nearest to that of the prompt, as an index into `labels`;
            only for routers that read labels.
        labels: The labels of the model.
    """

    origin_B3: Tensor | None = None
    stride: tuple[int, int, int] = (1, 1, 1)
    text_BT: Tensor | None = None
    label_B: Tensor | None = None
    labels: tuple[str, ...] = ()

    def with_stride(self, stride: tuple[int, int, int]) -> MapContext:
        """Returns a copy with another stride."""
        return replace(self, stride=stride)

    def of_prompt(self, index: int, batch: int, origin_B3: Tensor | None) -> MapContext:
        """Returns the context of one of several prompts, for a batch of maps that begin at these origins."""
        assert self.text_BT is not None
        label_B = None if self.label_B is None else self.label_B[index].expand(batch)
        return replace(self, origin_B3=origin_B3, text_BT=self.text_BT[index].expand(batch, -1), label_B=label_B)


# A map that begins at voxel 0 and has the resolution of the network grid.
DEFAULT_CONTEXT = MapContext()
