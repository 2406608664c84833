"""Routing that is balanced in training by Sinkhorn's algorithm, as in Megatron-Core (Clark et al. 2022, S-BASE)."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from mome.errors import InputError
from mome.map_context import MapContext
from mome.registry import at_least
from mome.routers.choice import ids_of_best
from mome.routers.gate import LinearGate
from mome.routers.group_router import GroupRouter, logits_by_group
from mome.routers.routing import TokenChoice, count_assignments


def sinkhorn(logits_GME: Tensor, iterations: int) -> Tensor:
    """The logarithm of the transport plan: exp(l), scaled until rows sum to 1/M and columns to 1/E.

    Each iteration scales the rows, then the columns, so that the columns are exact and the rows converge. It works on
    logarithms, where no exponential overflows. The number of iterations is fixed, whereas Megatron-Core stops at a
    tolerance; a fixed number can be compiled, and does not depend on the other groups of the batch.
    """
    tokens, experts = logits_GME.shape[1:]
    columns_G1E = torch.zeros_like(logits_GME[:, :1])
    rows_GM1 = torch.zeros_like(logits_GME[..., :1])
    for _ in range(iterations):
        rows_GM1 = -(logits_GME + columns_G1E).logsumexp(dim=2, keepdim=True) - log(tokens)
        columns_G1E = -(logits_GME + rows_GM1).logsumexp(dim=1, keepdim=True) - log(experts)
    return logits_GME + rows_GM1 + columns_G1E


class SinkhornRouter(GroupRouter):
    """In training a token takes the k experts that Sinkhorn's plan of its group favours; in eval those of W x.

    The plan chooses only and has no gradient. The weights are sigmoid(W x) of the chosen expert where k = 1, else the
    chosen entries of softmax(W x). The plan evens the load, so there is no balance loss. In eval a token's experts do
    not depend on its group.

    Source: S-BASE (Clark et al. 2022, arXiv 2202.01169); that the number of iterations is fixed is our choice.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `sinkhorn`.

        Args:
            k: Experts per token.
            iterations: Scalings of rows and columns in training.
            window: Side in voxels of the map of the windows that are groups; 0 makes each patch one group.
        """

        k: int = 1
        iterations: int = 8
        window: int = 0

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        super().__init__("sinkhorn", config.window)
        if not 1 <= config.k <= num_experts:
            raise InputError(
                f"router 'sinkhorn' picks k={config.k} experts of {num_experts}",
                hint=f"use a k from 1 to {num_experts}, or more experts, as in experts='swiglu(n=8)'",
            )
        at_least(1, "router sinkhorn", iterations=config.iterations)
        self.num_experts, self.k, self.iterations = num_experts, config.k, config.iterations
        self.gate = LinearGate(dim, num_experts)

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> TokenChoice:
        groups = self.groups_of(x_BDHWC)
        logits_GME = logits_by_group(self.gate, x_BDHWC, groups)
        with torch.no_grad():
            plan_GME = sinkhorn(logits_GME, self.iterations) if self.training else logits_GME
            ids_TK = groups.join(ids_of_best(plan_GME, self.k))
        logits_TE = groups.join(logits_GME)
        scores_TE = logits_TE.sigmoid() if self.k == 1 else logits_TE.softmax(dim=-1)
        counts_E = count_assignments(ids_TK, self.num_experts)
        return TokenChoice(counts_E, scores_TE, ids_TK=ids_TK, weights_TK=scores_TE.gather(1, ids_TK))
