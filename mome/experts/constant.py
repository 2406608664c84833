"""Experts that blend the token with a learned vector."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from mome.experts.base import TokenExperts
from mome.registry import at_least


class ConstantExperts(TokenExperts):
    """y_e = a₁ · x + a₂ · v_e, (a₁, a₂) = softmax(W_e x) (the constant expert of MoE++, arXiv 2410.07348).

    The blend of every expert is computed for every token, which takes 2 · n · D multiplications, and the routing
    weights choose among them. It is computed in float32 at least. Beside experts that compute more, these stand in
    `adaptive`.
    """

    stacked = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `constant`.

        Args:
            n: Number of experts.
        """

        n: int = 1

    def __init__(self, config: Config, *, dim: int) -> None:
        super().__init__()
        at_least(1, "constant experts", n=config.n)
        self.num_experts = config.n
        self.blend_E2D = nn.Parameter(torch.empty(config.n, 2, dim))
        self.vector_ED = nn.Parameter(torch.empty(config.n, dim))

    def forward(self, x_TD: Tensor, ids_TK: Tensor | None, weights_TK: Tensor | None) -> Tensor:
        assert ids_TK is not None and weights_TK is not None
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            x, vector_ED = x_TD.to(wide), self.vector_ED.to(wide)
            shares_TE2 = (x @ self.blend_E2D.to(wide).flatten(0, 1).T).unflatten(-1, (-1, 2)).softmax(-1)
            gates_TE = x.new_zeros(x.shape[0], self.num_experts).scatter_add(1, ids_TK.long(), weights_TK.to(wide))
            tokens_TE, vectors_TE = (gates_TE[..., None] * shares_TE2).unbind(-1)
            return (tokens_TE.sum(-1, keepdim=True) * x + vectors_TE @ vector_ED).to(x_TD.dtype)

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Begins with vectors of variance one, as the authors do, and with shares that lie near one half."""
        init.normal_(self.blend_E2D, std=std)
        init.normal_(self.vector_ED, std=1.0)
