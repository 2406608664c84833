"""A mixture of experts over tokens: router, expert bodies, dispatch by the grouped kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mome.registry import EXPERTS, ROUTERS
from mome.routers.routing import Routing


class MixtureOfExperts(nn.Module):
    """Tokens (T, D) → tokens (T, D).

    One expert needs no router: every token takes it, and `routing` is None.

    Args:
        experts: Spec of the expert bodies, as in `swiglu(n=8)`.
        router: Spec of the token router; only used where there is more than one expert.
        dim: Token width D.
    """

    def __init__(self, experts: str | dict[str, Any], router: str | dict[str, Any], *, dim: int) -> None:
        super().__init__()
        self.experts = EXPERTS.build(experts, dim=dim)
        several = self.experts.num_experts > 1
        self.router = ROUTERS.build(router, dim=dim, num_experts=self.experts.num_experts) if several else None

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Routing | None]:
        routing = self.router(x_TD) if self.router is not None else None
        y_TD = self.experts(x_TD, routing)
        return (x_TD + y_TD if self.experts.residual else y_TD), routing
