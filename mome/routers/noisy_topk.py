"""Noisy top-k gating: noise of a learned size decides in training which experts a token tries."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome.errors import InputError
from mome.map_context import MapContext
from mome.routers.gate import float32_linear
from mome.routers.linear_router import LinearRouter, best_experts, softmax_over_experts
from mome.routers.routing import TokenChoice

# The noise keeps this standard deviation where softplus vanishes, so that the load loss stays finite (our choice).
_LEAST_NOISE = 1e-2


class NoisyTopKRouter(LinearRouter):
    """H = W_g x + ε · σ with σ = softplus(W_n x) + 0.01 and ε ~ N(0, 1); the k best are weighed by their softmax.

    After Shazeer et al. 2017, *Outrageously Large Neural Networks* (arXiv 1701.06538), section "Noisy Top-K Gating".
    In eval there is no noise. The load of an expert is the expected number of tokens that choose it if the noise of
    this expert is drawn again: Σ_t Φ((l_e − threshold) / σ_e), where the threshold is the k-th best of the other
    experts' H. W_n starts at zero, as in the paper; W_g starts random (our choice: at zero, all experts tie in eval).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `noisy_topk`.

        Args:
            k: Experts per token, at least 2: the weight of a single expert is always one, so that the router would
                not learn from the segmentation.
            importance_weight: Weight of the importance loss.
            load_weight: Weight of the load loss.
            balance_weight: Weight of the load balance loss, whose probabilities are the softmax of the logits without
                noise.
            z_weight: Weight of the router z-loss of the logits without noise.
        """

        k: int = 2
        importance_weight: float = 0.01
        load_weight: float = 0.01
        balance_weight: float = 0.0
        z_weight: float = 0.0

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        super().__init__(config, name="noisy_topk", dim=dim, num_experts=num_experts, k=config.k)
        if config.k == 1:
            raise InputError(
                "router noisy_topk with k=1 gives every expert the weight one and learns nothing from the segmentation",
                hint="noisy_topk(k=2), or router='switch' for one expert per token",
            )
        self.noise_weight_EC = nn.Parameter(torch.zeros_like(self.weight_EC))

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> TokenChoice:
        x_TC = x_BDHWC.flatten(0, 3)
        logits_TE = noisy_TE = self.logits(x_TC)
        scale_TE = torch.ones_like(logits_TE)
        if self.training:
            scale_TE = F.softplus(float32_linear(x_TC, self.noise_weight_EC)) + _LEAST_NOISE
            noisy_TE = logits_TE + torch.randn(logits_TE.shape, device=logits_TE.device) * scale_TE
        best_TK, ids_TK = best_experts(noisy_TE, self.k)
        probabilities_TE = softmax_over_experts(logits_TE)
        return self.token_choice(
            probabilities_TE,
            ids_TK,
            best_TK.softmax(dim=-1),
            logits_TE=logits_TE,
            probabilities_TE=probabilities_TE,
            load_E=lambda: self._chances(logits_TE, noisy_TE, scale_TE).sum(0),
        )

    def _chances(self, logits_TE: Tensor, noisy_TE: Tensor, scale_TE: Tensor) -> Tensor:
        """The probability (T, E) that an expert is among the k best if its own noise is drawn again."""
        if self.k == self.num_experts:
            return torch.ones_like(logits_TE)
        best = noisy_TE.topk(self.k + 1, dim=-1).values
        if_chosen_T1, if_not_T1 = best[:, self.k :], best[:, self.k - 1 : self.k]
        threshold_TE = torch.where(noisy_TE > if_chosen_T1, if_chosen_T1, if_not_T1)
        return torch.special.ndtr((logits_TE - threshold_TE) / scale_TE)

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Fills W_g with a normal distribution and W_n with zeros."""
        super().init_weights_(init, std)
        init.zeros_(self.noise_weight_EC)
