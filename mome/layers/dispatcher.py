"""Brings the voxels of a map to the experts that a routing chose, and their results back; all on one device."""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from mome.experts.base import Experts, MapExperts, TokenExperts
from mome.map_context import MapContext
from mome.routers.routing import Assignments, Routing, Slots, TokenChoice


class LocalDispatcher:
    """Runs every expert in this process."""

    def __call__(self, experts: nn.Module, x_BDHWC: Tensor, routing: Routing | None, context: MapContext) -> Tensor:
        """The weighted sum of the experts' results: (B, D, H, W, C) → (B, D, H, W, C).

        Args:
            experts: The expert body, or an adapter around it.
            x_BDHWC: The map.
            routing: None where there is one expert, which gets every voxel with weight one.
            context: Place and prompts, for experts that read them.
        """
        kind = _without_adapters(experts)
        if isinstance(kind, MapExperts):
            shape = (*x_BDHWC.shape[:4], kind.num_experts)
            gates_BDHWE = x_BDHWC.new_ones(shape) if routing is None else routing.gates_TE().view(shape)
            return experts(x_BDHWC, gates_BDHWE, context)
        assert isinstance(kind, TokenExperts)
        x_TD = x_BDHWC.flatten(0, 3)
        if routing is None and kind.dense_when_single:
            return experts(x_TD, None, None).view(x_BDHWC.shape)
        return self._tokens(experts, x_TD, routing).view(x_BDHWC.shape)

    def _tokens(self, experts: nn.Module, x_TD: Tensor, routing: Routing | None) -> Tensor:
        match routing:
            case None:
                ids_T1 = torch.zeros(x_TD.shape[0], 1, dtype=torch.int64, device=x_TD.device)
                return experts(x_TD, ids_T1, torch.ones(ids_T1.shape, dtype=torch.float32, device=x_TD.device))
            case TokenChoice():
                return experts(x_TD, routing.ids_TK, routing.weights_TK)
            case Assignments():  # each assignment is a token of its own
                rows_ND, experts_N1 = x_TD[routing.tokens_N], routing.experts_N[:, None]
                y_ND = experts(rows_ND, experts_N1, routing.weights_N[:, None])
                # unlike index_add, this sums in a fixed order on GPUs too
                return x_TD.new_zeros(x_TD.shape).index_put((routing.tokens_N,), y_ND.to(x_TD.dtype), accumulate=True)
            case Slots():
                return self._slots(experts, x_TD, routing)
        raise TypeError(f"a routing is a TokenChoice, Assignments or Slots, not a {type(routing).__name__}")

    def _slots(self, experts: nn.Module, x_TD: Tensor, routing: Slots) -> Tensor:
        groups, _, slots = routing.dispatch_GMS.shape
        x_GMD = rearrange(x_TD, "(g m) d -> g m d", g=groups)
        slots_GSD = routing.dispatch_GMS.to(x_TD.dtype).transpose(1, 2) @ x_GMD
        per_expert = slots // _without_adapters(experts).num_experts
        experts_S1 = torch.arange(slots, device=x_TD.device)[:, None] // per_expert
        experts_N1 = experts_S1.repeat(groups, 1)
        y_ND = experts(slots_GSD.flatten(0, 1), experts_N1, routing.dispatch_GMS.new_ones(experts_N1.shape))
        return (routing.combine_GMS.to(x_TD.dtype) @ y_ND.unflatten(0, (groups, slots))).flatten(0, 1)


def _without_adapters(experts: nn.Module) -> Experts:
    """The expert body inside the wrappers of PEFT (`target_parameters`), which lack its attributes.

    The wrapper is what must be called: it adds the adapter's weights to those of the body.
    """
    while not isinstance(experts, Experts):
        experts = cast("nn.Module", experts.base_layer)
    return experts
