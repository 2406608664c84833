"""Soft mixtures: experts work on slots, each a weighted mean of tokens (Puigcerver et al. 2024, arXiv 2308.00951)."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from mome.map_context import MapContext
from mome.registry import at_least
from mome.routers.group_router import GroupRouter
from mome.routers.routing import Slots


class SoftRouter(GroupRouter):
    """L = s · x̂ μ̂ with x̂ = x/‖x‖ and μ̂ = μ/‖μ‖; slots = softmax over tokens(L)ᵀ x; y = softmax over slots(L) f(slots).

    Every expert has `slots` slots, each with a learned vector μ; s is one learned scale, 1 at first. The normalised
    tokens make the logits only: the slots are means of the tokens as they are. ‖x‖² is increased by 1e-6, as in the
    authors' code (google-research/vmoe), so that a token of zeros has a bounded gradient. The number of slots is fixed,
    whereas the paper takes it from the number of tokens; our choice: a patch has many more tokens than an image.

    The matrix of tokens and slots is never stored (`mome.routers.slot_attention`). With 64³ tokens of width 16 and
    8 · 16 slots, forward and backward of the layer add 154 MB to the peak memory of a process (float32, CPU); with the
    matrices it would be more than 800 MB. `tests/test_routers_soft.py` holds it to less than 300 MB.
    """

    returns = Slots

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `soft`.

        Args:
            slots: Slots per expert.
            window: Side in voxels of the map of the windows that are groups; 0 makes each patch one group.
        """

        slots: int = 16
        window: int = 0

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        super().__init__("soft", config.window)
        at_least(1, "router soft", slots=config.slots)
        self.num_experts, self.slots = num_experts, config.slots
        self.slots_SC = nn.Parameter(torch.empty(num_experts * config.slots, dim))
        self.scale = nn.Parameter(torch.empty(1))  # FSDP2 shards no parameter without a dimension

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> Slots:
        groups = self.groups_of(x_BDHWC)
        with torch.autocast(x_BDHWC.device.type, enabled=False):
            keys_GMC = unit_length(groups.split(x_BDHWC.flatten(0, 3)).float())
            queries_SC = self.scale.float() * unit_length(self.slots_SC.float())
        counts_E = torch.full((self.num_experts,), keys_GMC.shape[0] * self.slots, device=x_BDHWC.device)
        return Slots(counts_E, keys_GMC=keys_GMC, queries_SC=queries_SC, groups=groups)

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Draws the directions of the slots; only their directions matter."""
        init.normal_(self.slots_SC, mean=0.0, std=1.0)
        init.ones_(self.scale)


def unit_length(x: Tensor) -> Tensor:
    """x / √(‖x‖² + 1e-6) along the last dimension.

    Division by max(‖x‖, ε), as in `torch.nn.functional.normalize`, has a gradient of 1/ε = 1e12 at zero. Tokens are
    exactly zero where a new layer reads background: the norm and the ReLU before it leave nothing, and biases are zero.
    """
    return x * (x.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()
