"""The results of the model's two halves: features of a volume, then logits with losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.utils import ModelOutput

from mome.routers.routing import Routing


class Features(NamedTuple):
    """A volume's features, which do not depend on any prompt.

    Attributes:
        scales_BSCDHW: Expert maps of the S scales at the finest resolution; None where the experts read prompts.
        bottleneck: (B, C_b, D_b, H_b, W_b).
        routings: How the voxels were routed: of sparse layers inside the encoder, then of each scale (None where a
            scale has one expert).
        expert_inputs: Where experts read prompts: the voxels (B, D_s, H_s, W_s, dim) of each scale before them.
        origin_B3: Where the patches lie; see `MapContext`.
        extra_maps: Logits (B, N, D, H, W) of the classes of each whole-model expert, at the volume's resolution.
    """

    scales_BSCDHW: Tensor | None
    bottleneck: Tensor
    routings: tuple[Routing | None, ...]
    expert_inputs: tuple[Tensor, ...] = ()
    origin_B3: Tensor | None = None
    extra_maps: tuple[Tensor, ...] = ()


class Decoded(NamedTuple):
    """The result of decoding prompts.

    Attributes:
        logits: (B, P, D, H, W) at the input's resolution.
        routings: Of experts that read prompts, else empty.
        scale_logits: See `MoMEOutput`; empty where they were not asked for.
    """

    logits: Tensor
    routings: list[Routing | None]
    scale_logits: tuple[Tensor, ...] = ()


@dataclass
class MoMEOutput(ModelOutput):
    """Result of `MoME.forward`.

    Attributes:
        logits: (B, P, D, H, W), independent per prompt (sigmoid).
        loss: Scalar, where targets were given: `segmentation_loss` plus `aux_loss`.
        segmentation_loss: The part of `loss` that compares logits with targets.
        aux_loss: Mean over the routers of the sum of their auxiliary losses; zero in eval.
        aux_losses: The same by name, each the mean over the routers; empty in eval.
        scale_logits: Logits (B, P, D_s, H_s, W_s) of the coarser scales by themselves, from fine to coarse; in training
            with a loss that reads them, else None.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    segmentation_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    aux_losses: dict[str, Tensor] | None = None
    scale_logits: tuple[Tensor, ...] | None = None

    @property
    def compared(self) -> Tensor | tuple[Tensor, ...]:
        """What a loss compares with the targets: the logits, and those of the coarser scales where there are any."""
        assert self.logits is not None
        return self.logits if self.scale_logits is None else (self.logits, *self.scale_logits)
