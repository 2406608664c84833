"""Routing by a fixed hash, without anything learned (after Roller et al. 2021, arXiv 2106.04426)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mome.map_context import MapContext
from mome.registry import at_least
from mome.routers.base import Router
from mome.routers.place import place_hash
from mome.routers.routing import TokenChoice, count_assignments


class HashRouter(Router):
    """Expert = hash(⌊p / window⌋, seed) mod E, weight 1, where p is the voxel's position on the network grid.

    The paper hashes the number of a word. A voxel has none, so its place is hashed: our choice. The position is the
    patch's origin plus the index times the stride of the map, so that tiles agree at their seams, all scales agree
    where their windows do, and a resumed training run routes as before. Contents and training change nothing.
    """

    reads_place = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `hash`.

        Args:
            window: Side, in voxels of the network grid, of the cubes that share an expert.
            seed: Chooses among the assignments of cubes to experts.
        """

        window: int = 8
        seed: int = 0

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        super().__init__()
        at_least(1, "router hash", window=config.window)
        at_least(0, "router hash", seed=config.seed)
        self.num_experts, self.window, self.seed = num_experts, config.window, config.seed

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> TokenChoice:
        hash_T = place_hash(x_BDHWC, context, window=self.window, seed=self.seed)
        ids_T1 = (hash_T % self.num_experts)[:, None]
        counts_E = count_assignments(ids_T1, self.num_experts)
        weights_T1 = torch.ones(ids_T1.shape, dtype=torch.float32, device=x_BDHWC.device)
        return TokenChoice(counts_E, ids_TK=ids_T1, weights_TK=weights_T1)
