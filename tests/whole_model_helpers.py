"""What the tests of whole models as experts share."""

from __future__ import annotations

import torch
from small_models import small
from torch import nn

from mome import MoME, WholeModel

SPACING = [2.0, 2.0, 3.0]


CLASSES = ["background", "liver", "Spleen"]


class Net(nn.Module):
    """A network of one convolution with a batch norm, whose statistics change if it is run in training mode."""

    def __init__(self, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv3d(1, classes, 3, padding=1)
        self.norm = nn.BatchNorm3d(classes)

    def forward(self, x):
        return 4 * self.norm(self.conv(x))


def whole(network=None, classes=CLASSES, **settings) -> WholeModel:
    return WholeModel(network or Net(), classes, **{"spacing": SPACING, **settings})


def model_with(*experts: WholeModel, **overrides) -> MoME:
    model = small(extra_experts=list(experts), **overrides)
    model.text_bank.set(torch.randn(3, 12, generator=torch.Generator().manual_seed(5)))
    return model


def rows(model: MoME, names=("liver", "spleen", "aorta")) -> torch.Tensor:
    return model.prompt_rows(model.text_bank.rows(list(names)), list(names))
