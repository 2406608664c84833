"""Auxiliary losses of routers. A router weighs them and returns them by name in its `Routing`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def load_balance_loss(probabilities_TE: Tensor, counts_E: Tensor) -> Tensor:
    """E · Σ_e f_e · P_e (Fedus et al. 2021, eq. 4–6): f_e the share of assignments, P_e the mean probability.

    The counts are summed over all processes, so that the loss does not depend on how tokens are spread over them.
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
