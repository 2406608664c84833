"""The contract of a vision encoder: a volume becomes a pyramid of decoder maps."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from mome.map_context import DEFAULT_CONTEXT, MapContext
from mome.routers.routing import Routing

Stride = tuple[int, int, int]


class Pyramid(NamedTuple):
    """The result of an encoder.

    Attributes:
        maps: S decoder maps (B, C_s, D_s, H_s, W_s), coarse to fine.
        bottleneck: (B, C_b, D_b, H_b, W_b), the deepest encoder map.
        routings: How sparse layers inside the encoder routed their tokens; their auxiliary losses count.
    """

    maps: tuple[Tensor, ...]
    bottleneck: Tensor
    routings: tuple[Routing, ...] = ()


class Encoder(nn.Module):
    """Volume (B, C, D, H, W) → Pyramid. An encoder is built with `in_channels`; it knows its shapes before any forward.

    Attributes:
        channels: C_s of the decoder maps, coarse to fine.
        strides: Voxels of the volume per voxel of each decoder map along D, H, W, coarse to fine; axes may differ. If
            the finest map is coarser than the volume, logits are interpolated.
        bottleneck_channels: C_b.
        size_divisor: The sides D, H, W of a volume are multiples of these.
        max_sides: The longest sides D, H, W of a volume, where a network has such a limit.
    """

    channels: tuple[int, ...]
    strides: tuple[Stride, ...]
    bottleneck_channels: int
    size_divisor: Stride
    max_sides: Stride | None = None

    def forward(self, x_BCDHW: Tensor, context: MapContext = DEFAULT_CONTEXT) -> Pyramid:
        """Encodes a volume.

        Args:
            x_BCDHW: The volume.
            context: Where the volume lies, for sparse layers inside the encoder (`context.with_stride(stride)`).
        """
        raise NotImplementedError


def isotropic(strides: tuple[int, ...]) -> tuple[Stride, ...]:
    """The same stride along all three axes, for each of the numbers."""
    return tuple((stride, stride, stride) for stride in strides)
