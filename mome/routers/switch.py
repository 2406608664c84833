"""The router of the Switch Transformer: one expert per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mome.errors import InputError
from mome.map_context import MapContext
from mome.routers.linear_router import LinearRouter, best_experts, softmax_over_experts
from mome.routers.routing import TokenChoice


class SwitchRouter(LinearRouter):
    """The most probable expert, weighed by its probability; inputs are jittered in training.

    Source: Fedus et al. 2021, *Switch Transformers* (arXiv 2101.03961).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `switch`.

        Args:
            jitter: Half-width of the multiplicative noise on the router's input, from 0 to below 1.
            balance_weight: Weight of the load balance loss.
            z_weight: Weight of the router z-loss.
            importance_weight: Weight of the importance loss.
        """

        jitter: float = 0.01
        balance_weight: float = 0.01
        z_weight: float = 0.0
        importance_weight: float = 0.0

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        super().__init__(config, name="switch", dim=dim, num_experts=num_experts, k=1)
        if not 0 <= config.jitter < 1:
            raise InputError(f"jitter of router switch is at least 0 and below 1, got {config.jitter}")
        self.jitter = config.jitter

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> TokenChoice:
        x_TC = x_BDHWC.flatten(0, 3)
        if self.training and self.jitter:
            x_TC = x_TC.float()  # bfloat16 has few values between 1 - jitter and 1 + jitter
            x_TC = x_TC * torch.empty_like(x_TC).uniform_(1 - self.jitter, 1 + self.jitter)
        logits_TE = self.logits(x_TC)
        probabilities_TE = softmax_over_experts(logits_TE)
        weights_T1, ids_T1 = best_experts(probabilities_TE, 1)
        return self.token_choice(
            probabilities_TE, ids_T1, weights_T1, logits_TE=logits_TE, probabilities_TE=probabilities_TE
        )
