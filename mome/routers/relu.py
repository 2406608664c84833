"""ReLU routing (ReMoE): a token has every expert with a positive logit, and a penalty steers how many these are."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.map_context import MapContext
from mome.registry import at_least
from mome.routers.all_processes import sum_over_processes
from mome.routers.linear_router import LinearRouter
from mome.routers.losses import l1_loss
from mome.routers.routing import Assignments, Routing

# The penalty's weight stays between these (our choice): a float32 that became 0 or infinite could not change any more.
_LEAST, _MOST = 1e-16, 1e16


class ReLURouter(LinearRouter):
    """Weights relu(W x + b), without softmax or top-k; the loss is λ · E · Σ_e f_e · P_e (`losses.l1_loss`).

    Wang et al. 2024, *ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing* (arXiv 2412.14711), with the
    constants of its code. After each optimiser step λ is multiplied by 1.2 if the share of zeros among all tokens'
    weights (the sparsity) was below 1 − k/E, and divided by 1.2 otherwise; the tokens of all processes count. Here
    every router has its own λ; the paper has one for the model, from the mean sparsity of its layers. The paper's gate
    has no b. Without it, half of the logits of tokens around zero stay positive however large the penalty becomes.

    A token may have no expert: then the layer's result is zero there. About half of the weights are positive at first,
    so that the first steps cost more than k experts per token.
    """

    returns = Assignments

    l1_weight: Tensor
    active: Tensor
    possible: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `relu`.

        Args:
            k: Mean number of experts per token that training aims at; it is below the number of experts.
            initial_l1_weight: λ at the start.
            l1_growth: Factor of λ per optimiser step, above 1.
        """

        k: int = 1
        initial_l1_weight: float = 1e-8
        l1_growth: float = 1.2

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        if config.k == num_experts:
            raise InputError(
                f"router relu aims at k={config.k} of {num_experts} experts per token, which leaves nothing to choose",
                hint=f"use a k below {num_experts}, or more experts, as in experts='swiglu(n=8)'",
            )
        super().__init__(config, name="relu", dim=dim, num_experts=num_experts, k=config.k)
        at_least(_LEAST, "router relu", initial_l1_weight=config.initial_l1_weight)
        if not config.l1_growth > 1:
            raise InputError(f"l1_growth of router relu is above 1, got {config.l1_growth}", hint="l1_growth=1.2")
        self.initial_l1_weight, self.l1_growth = config.initial_l1_weight, config.l1_growth
        self.register_buffer("l1_weight", torch.tensor(config.initial_l1_weight, dtype=torch.float32))
        self.bias_E = nn.Parameter(torch.zeros(num_experts))
        # the numbers of positive weights and of all weights since the last optimiser step
        self.register_buffer("active", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("possible", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> Assignments:
        scores_TE = (self.logits(x_BDHWC.flatten(0, 3)) + self.bias_E.float()).relu()
        active_TE = ~(scores_TE <= 0)  # NaN counts as active, so that it reaches the result
        counts_E = active_TE.sum(0)
        tokens_N, experts_N = active_TE.nonzero(as_tuple=True)
        losses = {"l1": self.l1_weight * l1_loss(scores_TE, counts_E, self.k)} if self.training else {}
        return Assignments(
            counts_E,
            scores_TE,
            losses,
            tokens_N=tokens_N,
            experts_N=experts_N,
            weights_N=scores_TE[tokens_N, experts_N],
            tokens=scores_TE.shape[0],
        )

    @torch.no_grad()
    def observe(self, routing: Routing) -> None:
        """Counts the positive weights."""
        assert isinstance(routing, Assignments)
        self.active += routing.counts_E.sum()
        self.possible += routing.tokens * self.num_experts

    @torch.no_grad()
    def after_step(self) -> None:
        """Adapts λ to the sparsity since the last optimiser step. Every process must call it."""
        active, possible = sum_over_processes(torch.stack([self.active, self.possible]))
        too_dense = active * self.num_experts > self.k * possible
        adapted = torch.where(too_dense, self.l1_weight * self.l1_growth, self.l1_weight / self.l1_growth)
        self.l1_weight.copy_(torch.where(possible > 0, adapted.clamp(_LEAST, _MOST), self.l1_weight))
        self.active.zero_()
        self.possible.zero_()

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Fills W with a normal distribution, b with zeros, and λ with its start."""
        super().init_weights_(init, std)
        init.zeros_(self.bias_E)
        init.constant_(self.l1_weight, self.initial_l1_weight)
        init.zeros_(self.active)
        init.zeros_(self.possible)
