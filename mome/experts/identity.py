"""Experts that return the token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mome.experts.base import TokenExperts
from mome.registry import at_least


class IdentityExperts(TokenExperts):
    """y_e = x (the copy expert of MoE++, Jin et al. 2024, arXiv 2410.07348; the zero expert of LongCat-Flash).

    No expert has a parameter; all of them are equal, and the routing weights alone differ. The layer's residual comes
    on top. Beside experts that compute they stand in `adaptive`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `identity`.

        Args:
            n: Number of experts.
        """

        n: int = 1

    def __init__(self, config: Config, *, dim: int) -> None:
        super().__init__()
        at_least(1, "identity experts", n=config.n)
        self.num_experts = config.n

    def forward(self, x_TD: Tensor, ids_TK: Tensor | None, weights_TK: Tensor | None) -> Tensor:
        assert weights_TK is not None
        return (x_TD * weights_TK.sum(-1, keepdim=True)).to(x_TD.dtype)
