"""A mixture of experts over the voxels of a map: a router, a dispatcher and an expert body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.experts.base import Experts
from mome.layers.dispatcher import LocalDispatcher
from mome.map_context import MapContext
from mome.registry import EXPERTS, ROUTERS, at_least, part
from mome.routers.base import Router
from mome.routers.routing import Routing, Slots


class MixtureOfExperts(nn.Module):
    """Map (B, D, H, W, C) → map of the same shape: y = Σ_e G(x)_e f_e(x) (Shazeer et al. 2017, arXiv 1701.06538).

    The residual belongs to the layer around it.

    One expert needs no router, unless the router says so (`needed_alone`): every voxel takes it, and the routing is
    None.

    Attributes:
        reads_prompts: Whether the result depends on the prompt, so that it is computed once per prompt.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The parts of a mixture.

        Args:
            experts: The expert body, as in `swiglu(n=8)`.
            router: The token router; most are used only where there is more than one expert.
            every: Inside an encoder, the mixture stands in every n-th block, or after every n-th stage, as
                `mome.layers.sparse.places` counts them. The scales' own mixtures ignore it.
        """

        experts: Any = part("experts", "swiglu(n=8)")
        router: Any = part("routers", "topk(k=2)")
        every: int = 1

    def __init__(self, config: Config, *, dim: int, text_dim: int | None = None) -> None:
        super().__init__()
        at_least(1, "moe", every=config.every)
        self.experts = _build_experts(config.experts, dim, text_dim)
        router_class, _ = ROUTERS.resolve(config.router)
        self.router = (
            _build_router(config.router, dim, text_dim, self.experts, config.experts["name"])
            if self.experts.num_experts > 1 or router_class.needed_alone
            else None
        )
        self.dispatch = LocalDispatcher()
        self._experts_read_prompts = self.experts.reads == "prompt"
        self.reads_prompts = self._experts_read_prompts or (self.router is not None and self.router.reads_prompts)

    @property
    def reads_labels(self) -> bool:
        """Whether the context of the prompts must hold their labels."""
        return self.router is not None and self.router.reads_labels

    def prompt_groups(self, prompts: MapContext) -> Tensor | None:
        """Says which prompts share their result: (P,) int64, or None where none do; see `Router.prompt_groups`."""
        if self._experts_read_prompts:
            return None
        if self.router is not None and self.router.reads_prompts:
            return self.router.prompt_groups(prompts)
        assert prompts.text_BT is not None
        return torch.zeros(prompts.text_BT.shape[0], dtype=torch.int64, device=prompts.text_BT.device)

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> tuple[Tensor, Routing | None]:
        routing = None
        if self.router is not None:
            routing = self.router(x_BDHWC, context)
            routing.router = self.router
        y_BDHWC = self.dispatch(self.experts, x_BDHWC, routing, context)
        return y_BDHWC, routing


def _build_experts(spec: dict[str, Any], dim: int, text_dim: int | None) -> Experts:
    expert_class, _ = EXPERTS.resolve(spec)
    runtime = {"text_dim": text_dim} if expert_class.reads == "prompt" else {}
    _check_prompt("experts", spec, expert_class.reads == "prompt", text_dim)
    return EXPERTS.build(spec, dim=dim, **runtime)


def _build_router(spec: dict[str, Any], dim: int, text_dim: int | None, experts: Experts, experts_name: str) -> Router:
    router_class, _ = ROUTERS.resolve(spec)
    if router_class.returns is Slots and experts.reads != "tokens":
        raise InputError(
            f"router '{spec['name']}' mixes voxels into slots, but experts '{experts_name}' read whole maps",
            hint="use a router that gives every voxel its experts, as in router='topk(k=2)'",
        )
    _check_prompt("router", spec, router_class.reads_prompts, text_dim)
    runtime = {"text_dim": text_dim} if router_class.reads_prompts else {}
    router = ROUTERS.build(spec, dim=dim, num_experts=experts.num_experts, **runtime)
    if router.num_experts != experts.num_experts:
        raise InputError(
            f"router '{spec['name']}' routes to {router.num_experts} experts, experts '{experts_name}' are "
            f"{experts.num_experts}",
            hint="build the router object for as many experts",
        )
    return router


def _check_prompt(kind: str, spec: dict[str, Any], reads_prompt: bool, text_dim: int | None) -> None:
    if reads_prompt and text_dim is None:
        raise InputError(
            f"{kind} '{spec['name']}' read{'' if kind == 'experts' else 's'} the prompt, which is not known here",
            hint=f"use it as {kind}= of the model; inside an encoder take one that reads tokens or the map",
        )
