"""Brings the voxels of a map to the experts that a routing chose, and their results back; all on one device."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, arange

from mome.experts.base import Experts, MapExperts, TokenExperts
from mome.map_context import MapContext
from mome.routers.routing import Assignments, Routing, Slots, TokenChoice


class LocalDispatcher:
    """Runs every expert in this process."""

    def __call__(self, experts: Experts, x_BDHWC: Tensor, routing: Routing | None, context: MapContext) -> Tensor:
        """The weighed results of the experts: (B, D, H, W, C) → (B, D, H, W, C).

        Args:
            experts: The expert body.
            x_BDHWC: The map.
            routing: None where there is one expert, which gets every voxel with weight one.
            context: Place and prompts, for experts that read them.
        """
        if isinstance(experts, MapExperts):
            shape = (*x_BDHWC.shape[:4], experts.num_experts)
            gates_BDHWE = x_BDHWC.new_ones(shape) if routing is None else routing.gates_TE().view(shape)
            return experts(x_BDHWC, gates_BDHWE, context)
        assert isinstance(experts, TokenExperts)
        return self._tokens(experts, x_BDHWC.flatten(0, 3), routing).view(x_BDHWC.shape)

    def _tokens(self, experts: TokenExperts, x_TC: Tensor, routing: Routing | None) -> Tensor:
        match routing:
            case None:
                return experts.single(x_TC)
            case TokenChoice():
                return experts(x_TC, routing.ids_TK, routing.weights_TK)
            case Assignments():
                y_NC = experts.grouped(x_TC[routing.tokens_N], routing.offsets)
                weighed_NC = (y_NC * routing.weights_N[:, None]).float()
                return x_TC.new_zeros(x_TC.shape).float().index_add(0, routing.tokens_N, weighed_NC).to(x_TC.dtype)
            case Slots():
                return self._slots(experts, x_TC, routing)
        raise TypeError(f"a routing is a TokenChoice, Assignments or Slots, not a {type(routing).__name__}")

    def _slots(self, experts: TokenExperts, x_TC: Tensor, routing: Slots) -> Tensor:
        groups, _, slots = routing.dispatch_GMS.shape
        x_GMC = rearrange(x_TC, "(g m) c -> g m c", g=groups)
        slots_GSC = routing.dispatch_GMS.to(x_TC.dtype).transpose(1, 2) @ x_GMC
        rows_NC = rearrange(slots_GSC, "g (e p) c -> (e g p) c", e=experts.num_experts)
        offsets = arange(experts.num_experts + 1, device=x_TC.device) * (groups * slots // experts.num_experts)
        y_NC = experts.grouped(rows_NC, offsets)
        y_GSC = rearrange(y_NC, "(e g p) c -> g (e p) c", e=experts.num_experts, g=groups)
        return (routing.combine_GMS.to(x_TC.dtype) @ y_GSC).flatten(0, 1)
