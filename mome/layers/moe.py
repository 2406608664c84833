"""A mixture of experts over the voxels of a map: a router, a dispatcher and an expert body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mome.errors import InputError
from mome.experts.base import MapExperts, TokenExperts
from mome.layers.dispatcher import LocalDispatcher
from mome.map_context import MapContext
from mome.registry import EXPERTS, ROUTERS, part
from mome.routers.routing import Routing, Slots


class MixtureOfExperts(nn.Module):
    """Map (B, D, H, W, C) → map of the same shape. The residual belongs to the layer around it.

    One expert needs no router: every voxel takes it, and the routing is None.

    Attributes:
        reads_prompts: Whether the result depends on the prompt, so that it is computed once per prompt.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The parts of a mixture.

        Args:
            experts: The expert body, as in `swiglu(n=8)`.
            router: The token router; it is used where there is more than one expert.
        """

        experts: Any = part("experts", "swiglu(n=8)")
        router: Any = part("routers", "topk(k=2)")

    def __init__(self, config: Config, *, dim: int, text_dim: int | None = None) -> None:
        super().__init__()
        expert_class, _ = EXPERTS.resolve(config.experts)
        kind = expert_class if isinstance(expert_class, type) else type(expert_class)
        if not issubclass(kind, TokenExperts | MapExperts):
            raise InputError(
                f"experts of class '{kind.__qualname__}' are no TokenExperts, MapExperts or PromptExperts",
                hint="derive the class from one of them; CONTRIBUTING.md has an example",
            )
        reads = kind.reads
        if reads == "prompt" and text_dim is None:
            raise InputError(
                f"experts '{config.experts['name']}' read the prompt, which is not known here",
                hint="use them as experts= of the model; inside an encoder take experts that read tokens or the map",
            )
        self.experts = EXPERTS.build(config.experts, dim=dim, **({"text_dim": text_dim} if reads == "prompt" else {}))
        several = self.experts.num_experts > 1
        self.router = ROUTERS.build(config.router, dim=dim, num_experts=self.experts.num_experts) if several else None
        if self.router is not None and self.router.returns is Slots and reads != "tokens":
            raise InputError(
                f"router '{config.router['name']}' mixes voxels into slots, but experts '{config.experts['name']}' "
                "read whole maps",
                hint="use a router that gives every voxel its experts, as in router='topk(k=2)'",
            )
        self.dispatch = LocalDispatcher()
        self.reads_prompts = reads == "prompt" or (self.router is not None and self.router.reads_prompts)

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> tuple[Tensor, Routing | None]:
        routing = None
        if self.router is not None:
            routing = self.router(x_BDHWC, context)
            routing.router = self.router
        y_BDHWC = self.dispatch(self.experts, x_BDHWC, routing, context)
        return y_BDHWC, routing
