"""A tiny segmentation model as one more expert of the fusion."""

from __future__ import annotations

import torch
from torch import nn

from mome import WholeModel


class TinyNetwork(nn.Module):
    """A convolution, (B, 1, D, H, W) → maps of background, liver and spleen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 3, 1)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))

    def forward(self, x_BCDHW: torch.Tensor) -> torch.Tensor:
        return 4 * self.conv(x_BCDHW)


# A config refers to the object, which somebody must keep alive.
EXPERT = WholeModel(TinyNetwork(), ["background", "liver", "spleen"], spacing=[2.0, 2.0, 2.0])


def in_config() -> dict[str, object]:
    """The values of a config with this expert."""
    return {"extra_experts": [EXPERT]}
