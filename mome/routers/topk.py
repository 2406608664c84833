"""Token-choice routing: every token picks its k best experts (Shazeer et al. 2017; Fedus et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mome.map_context import MapContext
from mome.routers.linear_router import LinearRouter, best_experts, softmax_over_experts
from mome.routers.routing import TokenChoice


class TopKRouter(LinearRouter):
    """softmax over the experts, the k best kept, their weights normalised to one (Mixtral, arXiv 2401.04088)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `topk`.

        Args:
            k: Experts per token.
            normalize: Whether the k weights are scaled to a sum of one, where k > 1.
            balance_weight: Weight of the load balance loss.
            z_weight: Weight of the router z-loss.
            importance_weight: Weight of the importance loss.
        """

        k: int = 2
        normalize: bool = True
        balance_weight: float = 0.01
        z_weight: float = 0.001
        importance_weight: float = 0.0

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        super().__init__(config, name="topk", dim=dim, num_experts=num_experts, k=config.k)
        self.normalize = config.normalize

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> TokenChoice:
        logits_TE = self.logits(x_BDHWC.flatten(0, 3))
        probabilities_TE = softmax_over_experts(logits_TE)
        weights_TK, ids_TK = best_experts(probabilities_TE, self.k)
        if self.normalize and self.k > 1:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return self.token_choice(
            probabilities_TE, ids_TK, weights_TK, logits_TE=logits_TE, probabilities_TE=probabilities_TE
        )
