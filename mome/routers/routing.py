"""What a token router returns, and the two auxiliary losses that routers share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Routing:
    """Assignments of T tokens to K experts each.

    Attributes:
        expert_ids_TK: int64, which experts a token goes to.
        weights_TK: float32, the gate of each assignment.
        counts_E: int64, assignments per expert.
        aux_loss: scalar, already weighted; zero outside training.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    counts_E: Tensor
    aux_loss: Tensor


def load_balance_loss(probabilities_TE: Tensor, counts_E: Tensor) -> Tensor:
    """E · Σ_e f_e · P_e (Fedus et al. 2021, eq. 4–6): f_e the share of assignments, P_e the mean probability.

    The counts are summed over all processes, so that the loss does not depend on how tokens are spread.
    """
    counts_E = counts_E.to(torch.float32)
    if dist.is_available() and dist.is_initialized():
        counts_E = counts_E.clone()
        dist.all_reduce(counts_E)
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return probabilities_TE.shape[1] * (share_E * probabilities_TE.mean(0)).sum()


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Mean squared log-partition (Zoph et al. 2022, ST-MoE, eq. 5): keeps router logits small."""
    return torch.logsumexp(logits_TE, dim=-1).square().mean()


def count_assignments(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """(T, K) → (E,) int64, without a host synchronisation."""
    one_TK = torch.ones_like(expert_ids_TK)
    return torch.zeros(num_experts, dtype=torch.int64, device=expert_ids_TK.device).scatter_add_(
        0, expert_ids_TK.flatten(), one_TK.flatten()
    )
