"""What the two halves of the model hand on: features of a volume, and logits with losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.utils import ModelOutput

from mome.routers.routing import Routing


class Features(NamedTuple):
    """What a volume becomes before any prompt is looked at.

    Attributes:
        scales_BSCDHW: Expert maps of the S scales at the finest resolution.
        bottleneck: (B, C_b, D_b, H_b, W_b).
        routings: How the tokens of each scale were routed; None where a scale has one expert.
    """

    scales_BSCDHW: Tensor
    bottleneck: Tensor
    routings: tuple[Routing | None, ...]


@dataclass
class MoMEOutput(ModelOutput):
    """Result of `MoME.forward`.

    Attributes:
        logits: (B, P, D, H, W), independent per prompt (sigmoid).
        loss: Scalar, where targets were given: segmentation loss plus routers' auxiliary losses.
        segmentation_loss: Masked cross entropy + Dice.
        aux_loss: Mean of the routers' auxiliary losses, zero in eval.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    segmentation_loss: Tensor | None = None
    aux_loss: Tensor | None = None
