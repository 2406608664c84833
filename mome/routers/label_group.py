"""Experts by anatomy: every label belongs to a group, and every group of labels has its expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mome.errors import InputError, did_you_mean
from mome.labels import load_table
from mome.labels.label import GROUPS
from mome.map_context import MapContext
from mome.routers.base import Router
from mome.routers.routing import TokenChoice, count_assignments


class LabelGroupRouter(Router):
    """Every voxel goes to the expert of the prompt's group, with weight 1 (our choice).

    The label of a prompt is the one whose stored text row is nearest, which for a label of the model is itself; so free
    text takes the group of the nearest label. The group of a label is that of the class table (`mome.labels`), and
    `other` for a label outside the table. The experts run once for each group that is asked for, however many prompts
    it has.
    """

    reads_prompts = True
    reads_labels = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `label_group`.

        Args:
            groups: For each expert, the groups of the class table that it serves; a label's own name may stand there
                too, and goes before its group. Empty deals the groups out in the order of the class table, so that
                related groups share an expert where there are fewer experts than groups.
        """

        groups: list[list[str]] = field(default_factory=list)

    def __init__(self, config: Config, *, dim: int, num_experts: int, text_dim: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self._group_of = {label.name: label.group for label in load_table()}
        groups = config.groups or _dealt_out(num_experts)
        if len(groups) != num_experts:
            raise InputError(
                f"router 'label_group' has groups for {len(groups)} experts, and there are {num_experts}",
                hint=f"write {num_experts} lists of groups, or use {len(groups)} experts",
            )
        self.expert_of: dict[str, int] = {}
        for expert, names in enumerate(groups):
            if not names:
                raise InputError(
                    f"expert {expert} of router 'label_group' has no group, so it would never be used",
                    hint=f"name groups for it, or use fewer experts; groups: {', '.join(GROUPS)}",
                )
            for name in names:
                if self.expert_of.setdefault(name, expert) != expert:
                    raise InputError(
                        f"router 'label_group' gives '{name}' to expert {self.expert_of[name]} and to expert {expert}",
                        hint="name every group once",
                    )

    def check_labels(self, labels: Sequence[str]) -> None:
        for name in self.expert_of:
            if name not in GROUPS and name not in labels:
                raise InputError(
                    f"'{name}' in router 'label_group' is no group and no label of the model"
                    f"{did_you_mean(name, [*GROUPS, *labels])}",
                    hint=f"groups: {', '.join(GROUPS)}",
                )
        self._experts(labels)

    def prompt_groups(self, prompts: MapContext) -> Tensor:
        """The expert of each prompt: prompts of one expert share their result."""
        assert prompts.label_B is not None
        return torch.tensor(self._experts(prompts.labels), device=prompts.label_B.device)[prompts.label_B]

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> TokenChoice:
        ids_T1 = self.prompt_groups(context).repeat_interleave(x_BDHWC[0, ..., 0].numel())[:, None]
        counts_E = count_assignments(ids_T1, self.num_experts)
        weights_T1 = torch.ones(ids_T1.shape, dtype=torch.float32, device=x_BDHWC.device)
        return TokenChoice(counts_E, ids_TK=ids_T1, weights_TK=weights_T1)

    def _experts(self, labels: Sequence[str]) -> list[int]:
        """The expert of each label.

        Raises:
            InputError: A label belongs to a group that has no expert.
        """
        experts = []
        for label in labels:
            group = self._group_of.get(label, "other")
            expert = self.expert_of.get(label, self.expert_of.get(group))
            if expert is None:
                raise InputError(
                    f"the label '{label}' has no expert in router 'label_group': its group is '{group}'",
                    hint=f"write '{group}', or the label itself, into one of the lists of groups=",
                )
            experts.append(expert)
        return experts


def _dealt_out(num_experts: int) -> list[list[str]]:
    """The groups of the class table in as many lists as there are experts, of nearly equal length."""
    dealt: list[list[str]] = [[] for _ in range(num_experts)]
    for i, name in enumerate(GROUPS):
        dealt[i * num_experts // len(GROUPS) if num_experts <= len(GROUPS) else i].append(name)
    return dealt
