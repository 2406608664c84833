"""What most routers share: logits that are a linear map of the token."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.routers.base import Router
from mome.routers.choice import ids_of_best
from mome.routers.gate import float32_linear
from mome.routers.losses import WeightedLosses
from mome.routers.routing import TokenChoice, count_assignments


class LinearRouter(Router):
    """A router whose logits are l = W x, with one row of W for each expert.

    Args:
        config: The router's Config, whose fields ending in `_weight` weigh its auxiliary losses.
        name: The router's name in messages.
        dim: Width C of the tokens.
        num_experts: E.
        k: Experts per token.

    Raises:
        InputError: k is not between 1 and E, or a weight of a loss is negative.
    """

    def __init__(self, config: Any, *, name: str, dim: int, num_experts: int, k: int) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise InputError(
                f"router {name} picks k={k} experts of {num_experts}",
                hint=f"use a k from 1 to {num_experts}"
                + (", or more experts, as in experts='swiglu(n=8)'" if k > num_experts else ""),
            )
        self.num_experts, self.k = num_experts, k
        self.weighted_losses = WeightedLosses(config, f"router {name}")
        # made through nn.Linear so that a seed gives the same weights as in earlier versions
        self.weight_EC = nn.Linear(dim, num_experts, bias=False).weight

    def logits(self, x_TC: Tensor) -> Tensor:
        """Router logits (T, E) in float32, whatever the model's precision."""
        return float32_linear(x_TC, self.weight_EC)

    def token_choice(
        self, scores_TE: Tensor, ids_TK: Tensor, weights_TK: Tensor, **known: Tensor | Callable[[], Tensor]
    ) -> TokenChoice:
        """Makes the routing; in training it holds the weighted losses.

        Args:
            scores_TE: The router's probability or score of each expert.
            ids_TK: The chosen experts.
            weights_TK: Their weights.
            known: What the losses read besides counts and weights; see `WeightedLosses`.
        """
        counts_E = count_assignments(ids_TK, self.num_experts)
        routing = TokenChoice(counts_E, scores_TE, ids_TK=ids_TK, weights_TK=weights_TK)
        if self.training:
            routing.losses = self.weighted_losses(
                counts_E=counts_E, importance_E=lambda: routing.gates_TE().sum(0), **known
            )
        return routing

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Fills the weights with a normal distribution of the model's `initializer_range`."""
        init.normal_(self.weight_EC, mean=0.0, std=std)


def softmax_over_experts(logits_TE: Tensor) -> Tensor:
    """The softmax of every token, computed in the memory order of `float32_linear`."""
    return logits_TE.t().softmax(dim=0).t()


def best_experts(scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best scores of every token and their experts, each (T, k), as `ids_of_best` orders them."""
    ids_TK = ids_of_best(scores_TE, k)
    return scores_TE.gather(-1, ids_TK), ids_TK
