"""Routed experts beside an expert that is always on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mome.experts.base import TokenExperts
from mome.experts.nested import build_token_experts, run_on_every_token
from mome.registry import part


class SharedExperts(TokenExperts):
    """y = routed(x) + σ(w · x) · shared(x); without the gate, y = routed(x) + shared(x).

    The ungated sum is DeepSeekMoE's (Dai et al. 2024, arXiv 2401.06066), which keeps common knowledge out of the
    routed experts; the gate is Qwen2-MoE's (Hugging Face's `Qwen2MoeSparseMoeBlock`). Every voxel gets the shared part
    once and with weight one, whatever the form of the routing. So does a voxel that no expert chose, under
    `expert_choice`, `depth` or `relu`. Under `depth` the shared part therefore costs every voxel.
    """

    routed_part = "routed"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `shared`.

        Args:
            routed: The experts that the router chooses from; they read tokens.
            shared: The expert that is always on: one expert that reads tokens.
            gate: Whether the shared part is weighed by a sigmoid gate.
        """

        routed: Any = part("experts", "swiglu(n=8)")
        shared: Any = part("experts", "swiglu(n=1)")
        gate: bool = True

    def __init__(self, config: Config, *, dim: int) -> None:
        super().__init__()
        self.routed = build_token_experts(config.routed, dim=dim, owner="shared", argument="routed")
        self.num_experts = self.routed.num_experts
        shared = build_token_experts(config.shared, dim=dim, owner="shared", argument="shared", count=1)
        self.shared = AlwaysOnExpert(shared, dim=dim, gate=config.gate)

    @property
    def always_on(self) -> nn.Module:
        """The shared part with its gate."""
        return self.shared

    def forward(self, x_TD: Tensor, ids_TK: Tensor | None, weights_TK: Tensor | None) -> Tensor:
        """The routed part; the dispatcher adds the always-on part."""
        return self.routed(x_TD, ids_TK, weights_TK)


class AlwaysOnExpert(nn.Module):
    """σ(w · x) · expert(x) for every voxel, or expert(x): (…, D) → (…, D).

    Args:
        expert: One token expert.
        dim: Width D of the voxels.
        gate: Whether there is a gate; it has no bias.
    """

    def __init__(self, expert: TokenExperts, *, dim: int, gate: bool) -> None:
        super().__init__()
        self.expert = expert
        self.gate = nn.Linear(dim, 1, bias=False) if gate else None
        self._dense = expert.dense_when_single

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        gate_T1 = None if self.gate is None else self.gate(x_TD).sigmoid()
        return run_on_every_token(self.expert, x_TD, gate_T1, dense=self._dense).view(x.shape)
