"""Token-choice routing: every token picks its k best experts (Shazeer et al. 2017; Fedus et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.map_context import MapContext
from mome.registry import at_least
from mome.routers.base import Router
from mome.routers.losses import load_balance_loss, router_z_loss
from mome.routers.routing import TokenChoice, count_assignments


class SoftmaxRouter(Router):
    """The part that `topk` and `switch` share: softmax over the experts, then the k best.

    Args:
        dim: Width C of the tokens.
        num_experts: E.
        k: Experts per token.
        normalize: Whether the k weights are scaled to a sum of one.
        balance_weight, z_weight: Weights of the auxiliary losses.
    """

    def __init__(
        self, *, dim: int, num_experts: int, k: int, normalize: bool, balance_weight: float, z_weight: float
    ) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise InputError(
                f"router picks k={k} experts of {num_experts}",
                hint=f"use a k from 1 to {num_experts}, or more experts, as in experts='swiglu(n=8)'",
            )
        at_least(0, "a router", balance_weight=balance_weight, z_weight=z_weight)
        self.num_experts, self.k, self.normalize = num_experts, k, normalize
        self.balance_weight, self.z_weight = balance_weight, z_weight
        # made through nn.Linear so that a seed gives the same weights as in earlier versions
        self.weight_EC = nn.Linear(dim, num_experts, bias=False).weight

    def logits(self, x_TC: Tensor) -> Tensor:
        """Router logits (T, E) in float32, whatever the model's precision."""
        with torch.autocast(x_TC.device.type, enabled=False):
            return nn.functional.linear(x_TC.float(), self.weight_EC.float())

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> TokenChoice:
        logits_TE = self.logits(x_BDHWC.flatten(0, 3))
        probabilities_TE = logits_TE.softmax(dim=-1)
        weights_TK, ids_TK = probabilities_TE.topk(self.k, dim=-1)
        if self.normalize and self.k > 1:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        counts_E = count_assignments(ids_TK, self.num_experts)
        losses = {}
        if self.training:
            losses["load_balance"] = self.balance_weight * load_balance_loss(probabilities_TE, counts_E)
            losses["router_z"] = self.z_weight * router_z_loss(logits_TE)
        return TokenChoice(counts_E, probabilities_TE, losses, ids_TK=ids_TK, weights_TK=weights_TK)

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Fills the weights with a normal distribution of the model's `initializer_range`."""
        init.normal_(self.weight_EC, mean=0.0, std=std)


class TopKRouter(SoftmaxRouter):
    """softmax over the experts, the k best kept, their weights normalised to one (Mixtral's order)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `topk`.

        Args:
            k: Experts per token.
            normalize: Whether the k weights are scaled to a sum of one.
            balance_weight: Weight of the load balance loss.
            z_weight: Weight of the router z-loss.
        """

        k: int = 2
        normalize: bool = True
        balance_weight: float = 0.01
        z_weight: float = 0.001

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        super().__init__(
            dim=dim,
            num_experts=num_experts,
            k=config.k,
            normalize=config.normalize,
            balance_weight=config.balance_weight,
            z_weight=config.z_weight,
        )


class SwitchRouter(SoftmaxRouter):
    """The Switch Transformer's router: one expert per token, inputs jittered in training (Fedus et al. 2021)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `switch`.

        Args:
            jitter: Half-width of the multiplicative noise on the router's input, from 0 to below 1.
            balance_weight: Weight of the load balance loss.
            z_weight: Weight of the router z-loss.
        """

        jitter: float = 0.01
        balance_weight: float = 0.01
        z_weight: float = 0.0

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        super().__init__(
            dim=dim,
            num_experts=num_experts,
            k=1,
            normalize=False,
            balance_weight=config.balance_weight,
            z_weight=config.z_weight,
        )
        if not 0 <= config.jitter < 1:
            raise InputError(f"jitter of router switch is at least 0 and below 1, got {config.jitter}")
        self.jitter = config.jitter

    def logits(self, x_TC: Tensor) -> Tensor:
        """Router logits (T, E) of the jittered tokens in training, of the tokens themselves in eval."""
        if self.training and self.jitter:
            x_TC = x_TC * torch.empty_like(x_TC).uniform_(1 - self.jitter, 1 + self.jitter)
        return super().logits(x_TC)
