"""Sigmoid scores with a balancing bias, as in DeepSeek-V3."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mome.routers.biased import BiasedRouter


class SigmoidRouter(BiasedRouter):
    """s = sigmoid(l); the k experts with the largest s + b are chosen; the weights are scale · s_e / Σ_chosen s.

    After DeepSeek-AI 2024, *DeepSeek-V3 Technical Report* (arXiv 2412.19437), without its groups, which
    `group_limited` has. The bias b is `BalancingBias`. For the load balance loss, scores are divided by their sum over
    all experts.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `sigmoid`.

        Args:
            k: Experts per token.
            normalize: Whether the k scores are scaled to a sum of one; None does so where k > 1. A single normalised
                score is always one, so that the router would learn from its losses only.
            scale: Factor of the weights.
            bias_rate: Step of the balancing bias per optimiser step; 0 holds the bias.
            balance_weight: Weight of the load balance loss.
            z_weight: Weight of the router z-loss.
            importance_weight: Weight of the importance loss.
        """

        k: int = 2
        normalize: bool | None = None
        scale: float = 1.0
        bias_rate: float = 0.001
        balance_weight: float = 0.0
        z_weight: float = 0.0
        importance_weight: float = 0.0

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        super().__init__(config, name="sigmoid", dim=dim, num_experts=num_experts)

    def score(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid()
