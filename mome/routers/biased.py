"""What `sigmoid` and `group_limited` share: a bias chooses the experts, and their scores alone weigh them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mome.errors import InputError
from mome.map_context import MapContext
from mome.registry import at_least
from mome.routers.balancing_bias import BalancingBias
from mome.routers.choice import ids_of_best
from mome.routers.linear_router import LinearRouter
from mome.routers.routing import Routing, TokenChoice

# Keeps a division by a sum of scores that are all zero finite, as in DeepSeek-V3's code.
_TINY = 1e-20


class BiasedRouter(LinearRouter):
    """Chooses by score plus bias; the weights are the chosen scores without the bias.

    Args:
        config: A Config with `k`, `normalize`, `scale`, `bias_rate` and weights of losses.
        name, dim, num_experts: See `LinearRouter`.

    Raises:
        InputError: See `LinearRouter`; or `scale` is not positive, or `bias_rate` is negative.
    """

    def __init__(self, config: Any, *, name: str, dim: int, num_experts: int) -> None:
        super().__init__(config, name=name, dim=dim, num_experts=num_experts, k=config.k)
        at_least(0, f"router {name}", bias_rate=config.bias_rate)
        if not config.scale > 0:
            raise InputError(f"scale of router {name} is above 0, got {config.scale}", hint="scale=1.0")
        self.scale = config.scale
        self.normalize = config.k > 1 if config.normalize is None else config.normalize
        self.bias = BalancingBias(num_experts, config.bias_rate)

    def score(self, logits_TE: Tensor) -> Tensor:
        """The positive score of each expert."""
        raise NotImplementedError

    def choose(self, preferences_TE: Tensor) -> Tensor:
        """The experts (T, K) of each token, from its scores plus the bias."""
        return ids_of_best(preferences_TE, self.k)

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> TokenChoice:
        logits_TE = self.logits(x_BDHWC.flatten(0, 3))
        scores_TE = self.score(logits_TE)
        ids_TK = self.choose(self.bias(scores_TE.detach()))
        weights_TK = scores_TE.gather(1, ids_TK)
        if self.normalize:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + _TINY)
        return self.token_choice(
            scores_TE,
            ids_TK,
            weights_TK * self.scale,
            logits_TE=logits_TE,
            probabilities_TE=lambda: scores_TE / (scores_TE.sum(-1, keepdim=True) + _TINY),
        )

    def observe(self, routing: Routing) -> None:
        """Counts the tokens of each expert for the bias."""
        self.bias.observe(routing.counts_E)

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves the bias."""
        self.bias.after_step()
