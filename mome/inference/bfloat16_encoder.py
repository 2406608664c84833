"""A model whose encoder computes in bfloat16 on the CPU, and everything else in its own type."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mome.encoders.base import Pyramid
from mome.inference.bfloat16_convolutions import BFloat16Convolutions
from mome.map_context import DEFAULT_CONTEXT, MapContext


class BFloat16Encoder(nn.Module):
    """An encoder under bfloat16 autocast; its maps are cast to the type of the volume.

    Experts and head stay in the model's own type, float32 as a rule, which is faster: their products have few channels,
    and other operations of bfloat16 are slow on a CPU (torch 2.14).

    Args:
        encoder: The encoder. It is not changed; attributes that this module lacks are those of the encoder.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "encoder":
                raise
            return getattr(self.encoder, name)

    def forward(self, x_BCDHW: Tensor, context: MapContext = DEFAULT_CONTEXT) -> Pyramid:
        """Encodes a volume; see `Encoder.forward`."""
        with torch.autocast("cpu", torch.bfloat16), BFloat16Convolutions():
            pyramid = self.encoder(x_BCDHW, context)
        # The group norm of the experts loses digits where channels come last (see `mome.layers.instance_norm`).
        layout = torch.contiguous_format
        maps = tuple(map_BCDHW.to(x_BCDHW.dtype, memory_format=layout) for map_BCDHW in pyramid.maps)
        return pyramid._replace(maps=maps, bottleneck=pyramid.bottleneck.to(x_BCDHW.dtype, memory_format=layout))


def with_bfloat16_encoder(model: Any) -> Any:
    """Returns a model with the same weights whose encoder computes in bfloat16 on the CPU."""
    network = copy.copy(model)
    network._modules = {**model._modules, "encoder": BFloat16Encoder(model.encoder)}
    return network
