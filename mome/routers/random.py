"""Routing to random experts, as a baseline for routers that learn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mome.errors import InputError
from mome.map_context import MapContext
from mome.registry import at_least
from mome.routers.base import Router
from mome.routers.place import place_hash, scramble
from mome.routers.routing import TokenChoice, count_assignments


class RandomRouter(Router):
    """k different experts with weight 1/k; every set of k experts is equally likely (our choice).

    The draw of a voxel is a function of its position on the network grid and of the seed (`mome.routers.place`), the
    same in every step. So tiles agree at their seams, and a resumed training run draws as before.
    """

    reads_place = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `random`.

        Args:
            k: Experts per token.
            seed: Chooses among the draws.
        """

        k: int = 1
        seed: int = 0

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        super().__init__()
        if not 1 <= config.k <= num_experts:
            raise InputError(
                f"router 'random' picks k={config.k} experts of {num_experts}",
                hint=f"use a k from 1 to {num_experts}, or more experts, as in experts='swiglu(n=8)'",
            )
        at_least(0, "router random", seed=config.seed)
        self.num_experts, self.k, self.seed = num_experts, config.k, config.seed

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> TokenChoice:
        place_T1 = place_hash(x_BDHWC, context, window=1, seed=self.seed)[:, None]
        experts_E = torch.arange(self.num_experts, device=x_BDHWC.device)
        # The number of the expert makes the draws of a voxel differ, so that there are no ties.
        draws_TE = scramble(place_T1 ^ scramble(experts_E + 1)) * self.num_experts + experts_E
        ids_TK = draws_TE.topk(self.k, dim=-1).indices
        counts_E = count_assignments(ids_TK, self.num_experts)
        weights_TK = torch.full(ids_TK.shape, 1 / self.k, dtype=torch.float32, device=x_BDHWC.device)
        return TokenChoice(counts_E, ids_TK=ids_TK, weights_TK=weights_TK)
