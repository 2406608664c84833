"""An expert from another package. `pip install .` makes it known to `mome list experts`, as `polynomial`."""

from dataclasses import dataclass

import torch
from torch import nn

from mome.experts.base import TokenExperts


class PolynomialExperts(TokenExperts):
    """y = Σ_i a_ei ⊙ xⁱ for i from 1 to the degree, channel by channel (our choice)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `polynomial`.

        Args:
            n: Number of experts.
            degree: Highest power of a channel's value.
        """

        n: int = 4
        degree: int = 2

    def __init__(self, config, *, dim):
        super().__init__()
        self.num_experts = config.n
        self.coefficients_EID = nn.Parameter(torch.empty(config.n, config.degree, dim))

    def forward(self, x_TD, ids_TK, weights_TK):
        mixed_TID = torch.einsum("tk,tkid->tid", weights_TK, self.coefficients_EID[ids_TK].float())
        powers_TID = torch.stack([x_TD.float() ** (i + 1) for i in range(mixed_TID.shape[1])], dim=1)
        return (mixed_TID * powers_TID).sum(1).to(x_TD.dtype)

    @torch.no_grad()
    def init_weights_(self, init, std):
        init.normal_(self.coefficients_EID, std=std)
