"""Expert-choice routing: every expert picks its best tokens of a group (Zhou et al. 2022, arXiv 2202.09368)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mome.errors import InputError
from mome.map_context import MapContext
from mome.routers.gate import LinearGate
from mome.routers.group_router import GroupRouter, logits_by_group
from mome.routers.groups import share_of, top_tokens
from mome.routers.routing import Assignments


class ExpertChoiceRouter(GroupRouter):
    """S = softmax over the experts of W x; expert e takes the C tokens of a group with the highest S_e, weight S_e.

    C = round(M · capacity / E) for a group of M tokens, at least 1; of equal scores the earlier tokens. A token may be
    taken by several experts, or by none: then only the residual around the layer keeps it. Every expert has the same
    load, so there is no balance loss.

    Source: Zhou et al. 2022 (arXiv 2202.09368).
    """

    returns = Assignments

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `expert_choice`.

        Args:
            capacity: Experts per token, on average; above 0 and at most the number of experts.
            window: Side in voxels of the map of the windows that are groups; 0 makes each patch one group.
        """

        capacity: float = 2.0
        window: int = 0

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        super().__init__("expert_choice", config.window)
        if not 0 < config.capacity <= num_experts:
            raise InputError(
                f"capacity of router 'expert_choice' is above 0 and at most the {num_experts} experts, "
                f"got {config.capacity:g}",
                hint="capacity is the number of experts per token on average, as in expert_choice(capacity=2.0)",
            )
        self.num_experts, self.capacity = num_experts, config.capacity
        self.gate = LinearGate(dim, num_experts)

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> Assignments:
        groups = self.groups_of(x_BDHWC)
        scores_GME = logits_by_group(self.gate, x_BDHWC, groups).softmax(dim=-1)
        scores_GEM = scores_GME.transpose(1, 2)
        taken = share_of(scores_GEM.shape[2], self.capacity / self.num_experts)
        index_GEN = top_tokens(scores_GEM.detach(), taken)
        tokens_GEM = groups.tokens_GM(x_BDHWC.device)[:, None].expand_as(scores_GEM)
        each = index_GEN.shape[0] * taken
        experts_E = torch.arange(self.num_experts, device=x_BDHWC.device)

        def by_expert(values_GEN: Tensor) -> Tensor:
            return values_GEN.transpose(0, 1).flatten()

        return Assignments(
            torch.full((self.num_experts,), each, device=x_BDHWC.device),
            groups.join(scores_GME),
            tokens_N=by_expert(tokens_GEM.gather(2, index_GEN)),
            experts_N=experts_E.repeat_interleave(each),
            weights_N=by_expert(scores_GEM.gather(2, index_GEN)),
            tokens=x_BDHWC[..., 0].numel(),
        )
