"""The contract of a head: fused maps and prompts → one logit per prompt and voxel."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn

from mome.errors import InputError


class HeadLayers(NamedTuple):
    """The arguments of the fused op that a head gives: w₃ · φ(W₂ φ(W₁ m + b₁) + b₂) + b₃ for every image and prompt.

    φ is ReLU, leaky where `negative_slope` > 0. Matrices are (out, in).
    """

    w1_BPCC: Tensor
    b1_BPC: Tensor
    w2_BPCC: Tensor
    b2_BPC: Tensor
    w3_BPC: Tensor
    b3_BP: Tensor
    negative_slope: float = 0.0


class Head(nn.Module):
    """Turns the mixture of a prompt into its logits.

    A head is built with `channels` (C), `text_dim` (T) and `bottleneck_channels`. `forward` says what it computes and
    is the reference; a head of three layers also returns their weights from `layers`, for the fused op. `layers` reads
    weights only through submodules that it calls.
    """

    def forward(self, mixture_BPCV: Tensor, text_PT: Tensor, bottleneck: Tensor) -> Tensor:
        """Mixture and prompts → logits (B, P, V).

        Args:
            mixture_BPCV: What the fusion returned, (B, P, C, V) or (B, 1, C, V) where it is the same for every prompt.
            text_PT: Text rows of the prompts.
            bottleneck: The encoder's deepest map (B, C_b, D_b, H_b, W_b).
        """
        raise NotImplementedError

    def layers(self, text_PT: Tensor, bottleneck: Tensor) -> HeadLayers | None:
        """The weights of the fused op, or None where the head has another form."""
        return None


def prior_logit(prior: float) -> float:
    """The logit of the probability of a voxel that a head starts from.

    Raises:
        InputError: `prior` does not lie strictly between 0 and 1.
    """
    if not 0 < prior < 1:
        raise InputError(f"prior of the head lies between 0 and 1, got {prior}", hint="prior=0.02 is the default")
    return math.log(prior / (1 - prior))
