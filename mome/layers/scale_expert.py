"""One decoder layer as an expert: project its map, run the expert body, bring it to the head's width."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mome.layers.channels_first import ChannelsFirstLinear
from mome.layers.moe import MixtureOfExperts
from mome.map_context import MapContext
from mome.routers.routing import Routing


class ScaleExpert(nn.Module):
    """GroupNorm → ReLU → 1×1×1 to `dim` → expert body at the scale's own resolution → 1×1×1 to the head width.

    Decoder layers as experts are the paper's (arXiv 2510.26996); the layers inside are our choice.

    Args:
        in_channels: Channels C_s of the decoder map.
        dim: Width of the voxels that the experts see.
        head_channels: Width C of the head.
        text_dim: Width of the text rows, for experts that read them.
        experts, router: Specs, see `mome.layers.moe`.
        residual: Whether the expert body's result is added to what it read.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dim: int,
        head_channels: int,
        text_dim: int,
        experts: dict[str, Any],
        router: dict[str, Any],
        residual: bool,
    ) -> None:
        super().__init__()
        groups = next(g for g in (16, 8, 4, 2, 1) if in_channels % g == 0)
        self.residual = residual
        self.norm = nn.GroupNorm(groups, in_channels)
        self.proj_in = nn.Linear(in_channels, dim)
        self.body = MixtureOfExperts(
            MixtureOfExperts.Config(experts=experts, router=router), dim=dim, text_dim=text_dim
        )
        self.proj_out = ChannelsFirstLinear(dim, head_channels)

    @property
    def reads_prompts(self) -> bool:
        """Whether `mix` needs a prompt, and so runs once per prompt."""
        return self.body.reads_prompts

    @property
    def reads_labels(self) -> bool:
        """Whether the context of the prompts must hold their labels."""
        return self.body.reads_labels

    def prompt_groups(self, prompts: MapContext) -> Tensor | None:
        """Says which prompts share the result of `mix`; see `MixtureOfExperts.prompt_groups`."""
        return self.body.prompt_groups(prompts)

    def project(self, map_BCDHW: Tensor) -> Tensor:
        """Map (B, C_s, D_s, H_s, W_s) → voxels (B, D_s, H_s, W_s, dim), before the experts."""
        return self.proj_in(self.norm(map_BCDHW).relu_().movedim(1, -1))

    def mix(self, x_BDHWC: Tensor, context: MapContext) -> tuple[Tensor, Routing | None]:
        """Voxels (B, D_s, H_s, W_s, dim) → feature (B, C, D_s, H_s, W_s), and how the voxels were routed."""
        y_BDHWC, routing = self.body(x_BDHWC, context)
        if self.residual:
            y_BDHWC = x_BDHWC + y_BDHWC
        return self.proj_out(y_BDHWC).movedim(-1, 1), routing

    def forward(self, map_BCDHW: Tensor, context: MapContext) -> tuple[Tensor, Routing | None]:
        """Map (B, C_s, D_s, H_s, W_s) → feature (B, C, D_s, H_s, W_s), and how its voxels were routed."""
        return self.mix(self.project(map_BCDHW), context)

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Keeps the variance through both projections."""
        for layer in (self.proj_in, self.proj_out):
            init.trunc_normal_(layer.weight, std=layer.weight.shape[1] ** -0.5)
