"""Token-choice routing: every token picks its k best experts (Shazeer et al. 2017; Fedus et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.registry import at_least
from mome.routers.routing import Routing, count_assignments, load_balance_loss, router_z_loss


class TopKRouter(nn.Module):
    """softmax over the experts, the k best kept, their gates normalised to one (Mixtral's order)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Experts per token; whether the k gates sum to one; weights of the two auxiliary losses."""

        k: int = 2
        normalize: bool = True
        balance_weight: float = 0.01
        z_weight: float = 0.001

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        super().__init__()
        if not 1 <= config.k <= num_experts:
            raise InputError(
                f"router picks k={config.k} experts of {num_experts}",
                hint=f"use a k from 1 to {num_experts}, or more experts, as in experts='swiglu(n=8)'",
            )
        at_least(0, "a router", balance_weight=config.balance_weight, z_weight=config.z_weight)
        self.config, self.num_experts = config, num_experts
        self.gate = nn.Linear(dim, num_experts, bias=False)

    def scores(self, x_TD: Tensor) -> Tensor:
        """Router logits (T, E) in float32, whatever the model's precision."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return nn.functional.linear(x_TD.float(), self.gate.weight.float())

    def forward(self, x_TD: Tensor) -> Routing:
        logits_TE = self.scores(x_TD)
        probabilities_TE = logits_TE.softmax(dim=-1)
        weights_TK, ids_TK = probabilities_TE.topk(self.config.k, dim=-1)
        if self.config.normalize and self.config.k > 1:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        counts_E = count_assignments(ids_TK, self.num_experts)
        aux = x_TD.new_zeros((), dtype=torch.float32)
        if self.training:
            aux = self.config.balance_weight * load_balance_loss(probabilities_TE, counts_E)
            aux = aux + self.config.z_weight * router_z_loss(logits_TE)
        return Routing(ids_TK, weights_TK, counts_E, aux)


class SwitchRouter(TopKRouter):
    """The Switch Transformer's router: one expert per token, inputs jittered in training (Fedus et al. 2021)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Half-width of the multiplicative noise on the router's input; weights of the auxiliary losses."""

        jitter: float = 0.01
        balance_weight: float = 0.01
        z_weight: float = 0.0

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        top1 = TopKRouter.Config(k=1, normalize=False, balance_weight=config.balance_weight, z_weight=config.z_weight)
        super().__init__(top1, dim=dim, num_experts=num_experts)
        if not 0 <= config.jitter < 1:
            raise InputError(f"jitter of router switch is at least 0 and below 1, got {config.jitter}")
        self.jitter = config.jitter

    def scores(self, x_TD: Tensor) -> Tensor:
        if self.training and self.jitter:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        return super().scores(x_TD)
