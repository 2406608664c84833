"""Mixture of depths: only the tokens of highest score go through the experts (Raposo et al. 2024, arXiv 2404.02258)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mome.errors import InputError
from mome.map_context import DEFAULT_CONTEXT, MapContext
from mome.registry import ROUTERS, part
from mome.routers.base import Router
from mome.routers.gate import LinearGate
from mome.routers.group_router import GroupRouter, logits_by_group
from mome.routers.groups import share_of, top_tokens
from mome.routers.routing import Assignments, Routing, Slots, TokenChoice


class DepthRouter(GroupRouter):
    """y = r · f(x) for the C tokens of a group with the highest r = w·x, and 0 for the others, kept by the residual.

    C = round(M · capacity) for a group of M tokens, at least 1; of equal scores the earlier tokens. With one expert, f
    is that expert; with several, `router` spreads the chosen tokens over them, and sees no others. The paper trains a
    predictor of the choice because a language model cannot see the tokens that follow. A patch is seen whole, so eval
    follows the same rule as training. Use it in layers with a residual.

    Source: Raposo et al. 2024, *Mixture-of-Depths* (arXiv 2404.02258).
    """

    returns = Assignments
    needed_alone = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `depth`.

        Args:
            capacity: The share of a group's tokens that go through the experts, above 0 and at most 1.
            router: The router of the chosen tokens, where there are several experts.
            window: Side in voxels of the map of the windows that are groups; 0 makes each patch one group.
        """

        capacity: float = 0.5
        router: Any = part("routers", "topk(k=1)")
        window: int = 0

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        super().__init__("depth", config.window)
        if not 0 < config.capacity <= 1:
            raise InputError(
                f"capacity of router 'depth' is a share of the tokens, above 0 and at most 1, got {config.capacity:g}",
                hint="use depth(capacity=0.5) for half of the tokens",
            )
        self.num_experts, self.capacity = num_experts, config.capacity
        self.gate = LinearGate(dim, 1)
        self.router = _build_inner(config.router, dim, num_experts) if num_experts > 1 else None

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> Assignments:
        groups = self.groups_of(x_BDHWC)
        r_G1M = logits_by_group(self.gate, x_BDHWC, groups).transpose(1, 2)
        index_G1N = top_tokens(r_G1M.detach(), share_of(r_G1M.shape[2], self.capacity))
        chosen_GN = groups.tokens_GM(x_BDHWC.device).gather(1, index_G1N[:, 0])
        r_N, chosen_N = r_G1M.gather(2, index_G1N).flatten(), chosen_GN.flatten()
        inner, row_N = None, torch.arange(len(chosen_N), device=x_BDHWC.device)
        experts_N = torch.zeros_like(chosen_N)
        counts_E = torch.full((1,), len(chosen_N), device=x_BDHWC.device)
        if self.router is not None:
            x_NC = x_BDHWC.flatten(0, 3)[chosen_N]
            inner = self.router(x_NC.view(chosen_GN.shape[0], -1, 1, 1, x_NC.shape[1]), DEFAULT_CONTEXT)
            inner.router = self.router
            row_N, experts_N, weights_N = _assignments(inner)
            r_N, counts_E = r_N[row_N] * weights_N, inner.counts_E
        return Assignments(
            counts_E,
            losses={} if inner is None else inner.losses,
            inner=inner,
            tokens_N=chosen_N[row_N],
            experts_N=experts_N,
            weights_N=r_N,
            tokens=x_BDHWC[..., 0].numel(),
        )

    def observe(self, routing: Routing) -> None:
        """Lets the nested router collect the statistics of its own routing."""
        if routing.inner is not None and self.router is not None:
            self.router.observe(routing.inner)


def _assignments(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """The token, the expert and the weight of every assignment."""
    if isinstance(routing, TokenChoice):
        tokens, each = routing.ids_TK.shape
        rows_N = torch.arange(tokens, device=routing.ids_TK.device).repeat_interleave(each)
        return rows_N, routing.ids_TK.flatten(), routing.weights_TK.flatten()
    assert isinstance(routing, Assignments)
    return routing.tokens_N, routing.experts_N, routing.weights_N


def _build_inner(spec: dict[str, Any], dim: int, num_experts: int) -> Router:
    router_class, _ = ROUTERS.resolve(spec)
    if router_class.returns is Slots:
        reason = "mixes tokens into slots"
    elif router_class.reads_prompts:
        reason = "reads the prompt"
    elif router_class.reads_place:
        reason = "reads the place of a voxel, which the chosen tokens have no longer"
    elif router_class.needed_alone:
        reason = "chooses tokens itself"
    elif spec.get("window"):
        reason = "has windows, which the chosen tokens do not form"
    else:
        router: Router = ROUTERS.build(spec, dim=dim, num_experts=num_experts)
        if router.num_experts == num_experts:
            return router
        reason = f"routes to {router.num_experts} experts, and there are {num_experts}"
    raise InputError(
        f"router '{spec['name']}' cannot stand inside 'depth': it {reason}",
        hint="use one that reads single tokens and is built for as many experts, as in depth(router=topk(k=1))",
    )
