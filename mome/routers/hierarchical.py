"""Two-level routing: first a group of experts, then experts of that group (Shazeer et al. 2017, appendix B)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mome.errors import InputError
from mome.map_context import MapContext
from mome.registry import at_least
from mome.routers.base import Router
from mome.routers.choice import ids_of_best
from mome.routers.gate import LinearGate
from mome.routers.losses import WeightedLosses
from mome.routers.routing import TokenChoice, count_assignments


class HierarchicalRouter(Router):
    """P(e) = P(group of e) · P(e | group); a token takes its best group, and in it the k best experts.

    Both probabilities are softmaxes of linear maps. The weights are the products P(e), not normalised. Expert e belongs
    to group ⌊e / (E / groups)⌋. The load is balanced at both levels: over the groups with P(group), and over all
    experts with the products. The paper gives both levels noisy top-k gates; the softmaxes are our choice.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `hierarchical`.

        Args:
            groups: Number of groups; it divides the number of experts.
            k: Experts per token, all of one group.
            group_balance_weight: Weight of the load balance loss over the groups.
            balance_weight: Weight of the load balance loss over the experts.
            z_weight: Weight of the router z-loss, which is the sum of those of both levels.
        """

        groups: int = 2
        k: int = 1
        group_balance_weight: float = 0.01
        balance_weight: float = 0.01
        z_weight: float = 0.001

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        super().__init__()
        at_least(1, "router hierarchical", groups=config.groups)
        if num_experts % config.groups:
            fits = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
            raise InputError(
                f"groups={config.groups} of router 'hierarchical' does not divide {num_experts} experts",
                hint=f"groups that do: {', '.join(map(str, fits))}",
            )
        size = num_experts // config.groups
        if not 1 <= config.k <= size:
            raise InputError(
                f"router 'hierarchical' picks k={config.k} experts of a group of {size}",
                hint=f"use a k from 1 to {size}, fewer groups, or more experts",
            )
        self.num_experts, self.groups, self.size, self.k = num_experts, config.groups, size, config.k
        self.weighted_losses = WeightedLosses(config, "router hierarchical")
        self.group_gate = LinearGate(dim, config.groups)
        self.gate = LinearGate(dim, num_experts)

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> TokenChoice:
        x_TC = x_BDHWC.flatten(0, 3)
        group_logits_TG = self.group_gate(x_TC)
        logits_TGI = self.gate(x_TC).unflatten(1, (self.groups, self.size))  # I experts in each group
        groups_TG, inner_TGI = group_logits_TG.softmax(dim=-1), logits_TGI.softmax(dim=-1)
        group_T1 = groups_TG.argmax(dim=-1, keepdim=True)
        chosen_TI = inner_TGI.gather(1, group_T1[..., None].expand(-1, 1, self.size))[:, 0]
        ids_TK = group_T1 * self.size + ids_of_best(chosen_TI, self.k)
        scores_TE = (groups_TG[..., None] * inner_TGI).flatten(1)
        counts_E = count_assignments(ids_TK, self.num_experts)
        losses = {}
        if self.training:
            losses = self.weighted_losses(
                probabilities_TE=scores_TE,
                counts_E=counts_E,
                groups_TG=groups_TG,
                counts_G=counts_E.view(self.groups, self.size).sum(1),
                logits_TE=(group_logits_TG, logits_TGI),
            )
        return TokenChoice(counts_E, scores_TE, losses, ids_TK=ids_TK, weights_TK=scores_TE.gather(1, ids_TK))
