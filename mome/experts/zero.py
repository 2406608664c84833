"""Experts that return zeros."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mome.experts.base import TokenExperts
from mome.registry import at_least


class ZeroExperts(TokenExperts):
    """y_e = 0 (the zero expert of MoE++, Jin et al. 2024, arXiv 2410.07348).

    A layer of zero experts alone leaves the residual as it is: it is the baseline of a model without experts. The
    router has no gradient but that of its auxiliary losses. Beside experts that compute they stand in `adaptive`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `zero`.

        Args:
            n: Number of experts.
        """

        n: int = 1

    def __init__(self, config: Config, *, dim: int) -> None:
        super().__init__()
        at_least(1, "zero experts", n=config.n)
        self.num_experts = config.n

    def forward(self, x_TD: Tensor, ids_TK: Tensor | None, weights_TK: Tensor | None) -> Tensor:
        assert weights_TK is not None
        # The product gives the router a gradient of zeros: training on several devices waits for every gradient.
        return x_TD.new_zeros(x_TD.shape) * weights_TK.sum(-1, keepdim=True).to(x_TD.dtype)
