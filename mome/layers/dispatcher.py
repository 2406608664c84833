"""Brings the voxels of a map to the experts that a routing chose, and their results back; all on one device."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mome.experts.base import Experts, MapExperts, TokenExperts
from mome.experts.rows import sum_rows, take_rows
from mome.map_context import MapContext
from mome.routers.routing import Assignments, Routing, Slots, TokenChoice


class LocalDispatcher:
    """Runs every expert in this process."""

    def __call__(self, experts: nn.Module, x_BDHWC: Tensor, routing: Routing | None, context: MapContext) -> Tensor:
        """The weighted sum of the experts' results and the always-on part: (B, D, H, W, C) → (B, D, H, W, C).

        Args:
            experts: The expert body, or an adapter around it.
            x_BDHWC: The map.
            routing: None where there is one expert, which gets every voxel with weight one.
            context: Place and prompts, for experts that read them.
        """
        y_BDHWC = self._routed(experts, x_BDHWC, routing, context)
        always_on = _without_adapters(experts).always_on
        return y_BDHWC if always_on is None else y_BDHWC + always_on(x_BDHWC)

    def _routed(self, experts: nn.Module, x_BDHWC: Tensor, routing: Routing | None, context: MapContext) -> Tensor:
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
                rows_ND, experts_N1 = take_rows(x_TD, routing.tokens_N), routing.experts_N[:, None]
                y_ND = experts(rows_ND, experts_N1, routing.weights_N[:, None])
                return sum_rows(y_ND, routing.tokens_N, x_TD.shape[0]).to(x_TD.dtype)
            case Slots():
                return self._slots(experts, x_TD, routing)
        raise TypeError(f"a routing is a TokenChoice, Assignments or Slots, not a {type(routing).__name__}")

    def _slots(self, experts: nn.Module, x_TD: Tensor, routing: Slots) -> Tensor:
        slots_GSD = routing.dispatch(x_TD)
        groups, slots = slots_GSD.shape[:2]
        # with expert parallelism the body's own number of experts is that of this process
        per_expert = slots // routing.counts_E.shape[0]
        experts_S1 = torch.arange(slots, device=x_TD.device)[:, None] // per_expert
        experts_N1 = experts_S1.repeat(groups, 1)
        y_ND = experts(slots_GSD.flatten(0, 1).to(x_TD.dtype), experts_N1, slots_GSD.new_ones(experts_N1.shape))
        return routing.combine(y_ND.unflatten(0, (groups, slots))).to(x_TD.dtype)


def _without_adapters(experts: nn.Module) -> Experts:
    """The expert body inside the wrappers of PEFT (`target_parameters`), which lack its attributes.

    The wrapper is what must be called: it adds the adapter's weights to those of the body.
    """
    while not isinstance(experts, Experts):
        experts = cast("nn.Module", experts.base_layer)
    return experts
