"""Group-limited routing: a token first picks groups of experts, then its experts among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mome.errors import InputError, did_you_mean
from mome.routers.biased import BiasedRouter
from mome.routers.choice import ids_of_best

_SCORES = {"sigmoid": torch.sigmoid, "softmax": lambda logits_TE: logits_TE.softmax(dim=-1)}


class GroupLimitedRouter(BiasedRouter):
    """Keeps the groups whose two largest s + b have the largest sum; the k largest s + b in them are chosen.

    After DeepSeek-AI 2024, *DeepSeek-V3 Technical Report* (arXiv 2412.19437), where a group is the experts of one node.
    Experts of a group are neighbours: group g holds experts g · E/groups to (g + 1) · E/groups − 1. Scores, bias and
    weights are those of `sigmoid`, or softmax scores in the place of sigmoid ones.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `group_limited`.

        Args:
            k: Experts per token.
            groups: Number of groups; it divides the number of experts, with at least two experts per group.
            groups_kept: Groups that a token chooses its experts from.
            score: `sigmoid` or `softmax`.
            normalize: Whether the k scores are scaled to a sum of one; None does so where k > 1.
            scale: Factor of the weights.
            bias_rate: Step of the balancing bias per optimiser step; 0 holds the bias.
            balance_weight: Weight of the load balance loss.
            z_weight: Weight of the router z-loss.
            importance_weight: Weight of the importance loss.
        """

        k: int = 2
        groups: int = 2
        groups_kept: int = 1
        score: str = "sigmoid"
        normalize: bool | None = None
        scale: float = 1.0
        bias_rate: float = 0.001
        balance_weight: float = 0.0
        z_weight: float = 0.0
        importance_weight: float = 0.0

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        super().__init__(config, name="group_limited", dim=dim, num_experts=num_experts)
        _check_groups(config, num_experts)
        self.groups, self.groups_kept, self.score_name = config.groups, config.groups_kept, config.score

    def score(self, logits_TE: Tensor) -> Tensor:
        return _SCORES[self.score_name](logits_TE)

    def choose(self, preferences_TE: Tensor) -> Tensor:
        preferences_TGM = preferences_TE.unflatten(-1, (self.groups, -1))
        group_scores_TG = preferences_TGM.topk(2, dim=-1).values.sum(-1)
        kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter(
            1, ids_of_best(group_scores_TG, self.groups_kept), True
        )
        return super().choose(preferences_TGM.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1))


def _check_groups(config: GroupLimitedRouter.Config, num_experts: int) -> None:
    """Checks the groups.

    Raises:
        InputError: They cannot be made from so many experts, or hold fewer than k; or the score is unknown.
    """
    owner, groups, kept = "router group_limited", config.groups, config.groups_kept
    if config.score not in _SCORES:
        raise InputError(
            f"score of {owner} is sigmoid or softmax, got {config.score!r:.60}{did_you_mean(config.score, _SCORES)}"
        )
    if groups < 1 or num_experts % groups or num_experts // groups < 2:
        fits = [n for n in range(1, num_experts // 2 + 1) if num_experts % n == 0]
        raise InputError(
            f"{owner} cannot divide {num_experts} experts into groups={groups} equal groups of at least two",
            hint=f"groups: {', '.join(map(str, fits)) or 'more experts are needed'}, or another number of experts",
        )
    if not 1 <= kept <= groups:
        raise InputError(
            f"{owner} keeps groups_kept={kept} of {groups} groups", hint=f"use a groups_kept from 1 to {groups}"
        )
    size = num_experts // groups
    if config.k > kept * size:
        raise InputError(
            f"{owner} picks k={config.k} experts from groups_kept={kept} groups of {size}",
            hint=f"use a k of at most {kept * size}, or a larger groups_kept",
        )
