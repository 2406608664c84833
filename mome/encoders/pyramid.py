"""What a vision encoder hands to the model: its decoder maps and its bottleneck."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Pyramid(NamedTuple):
    """Decoder maps, coarse to fine, and the bottleneck.

    Attributes:
        maps: S tensors (B, C_s, D_s, H_s, W_s), coarse to fine. The finest has stride `encoder.strides[-1]`.
        bottleneck: (B, C_b, D_b, H_b, W_b), the deepest encoder map.
    """

    maps: tuple[Tensor, ...]
    bottleneck: Tensor
