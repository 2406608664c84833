"""Auxiliary losses of routers, and the weighing of those that a router's Config names.

A field of a Config that ends in `_weight` weighs one loss. A Config has the fields of the losses that its router can
compute, so that the registry refuses any other by its name.

Statistics over tokens are those of one forward pass: gradient accumulation sums losses of smaller batches. They are
summed over all processes, so that a loss does not depend on how its tokens are spread over them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mome.registry import at_least
from mome.routers.all_processes import differentiable_sum_over_processes, sum_over_processes


def load_balance_loss(probabilities_TE: Tensor, counts_E: Tensor) -> Tensor:
    """E · Σ_e f_e · P_e (Fedus et al. 2021, eq. 4–6): f_e the share of assignments, P_e the mean probability.

    The loss is 1 where the load is even, for every number k of experts per token. Hugging Face's
    `load_balancing_loss_func` divides the counts by the tokens and not by the assignments, so that it is k times this.
    The counts are summed over all processes, so that the loss does not depend on how tokens are spread over them.
    """
    counts_E = sum_over_processes(counts_E).to(torch.float32)
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return probabilities_TE.shape[1] * (share_E * probabilities_TE.mean(0)).sum()


def router_z_loss(logits_TE: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Mean squared log-partition (Zoph et al. 2022, ST-MoE, eq. 5): keeps router logits small.

    Args:
        logits_TE: The logits; of a router with several softmaxes the logits of each, whose losses are added.
    """
    if isinstance(logits_TE, tuple):
        return torch.stack([router_z_loss(logits) for logits in logits_TE]).sum()
    return torch.logsumexp(logits_TE, dim=-1).square().mean()


def importance_loss(importance_E: Tensor) -> Tensor:
    """CV² of the sum over tokens of each expert's weights (Shazeer et al. 2017, the importance loss).

    The sum goes over the tokens of all processes; see `differentiable_sum_over_processes`.
    """
    return squared_variation(differentiable_sum_over_processes(importance_E))


def load_loss(load_E: Tensor) -> Tensor:
    """CV² of each expert's expected number of tokens, which is smooth (Shazeer et al. 2017, the load loss).

    The sum goes over the tokens of all processes; see `differentiable_sum_over_processes`.
    """
    return squared_variation(differentiable_sum_over_processes(load_E))


def squared_variation(values_E: Tensor) -> Tensor:
    """CV² = Var / Mean², the squared coefficient of variation, with the population variance; 0 where all are equal."""
    return values_E.var(correction=0) / (values_E.mean().square() + 1e-10)


def l1_loss(scores_TE: Tensor, counts_E: Tensor, k: int) -> Tensor:
    """E · Σ_e f_e · P_e with f_e = counts_e / (k · T) and P_e the mean score; the L1 penalty of ReMoE.

    Wang et al. 2024 (arXiv 2412.14711), in the form of their code. It shrinks the scores, and most those of the experts
    with the most tokens.

    Args:
        scores_TE: At least 0.
        counts_E: The number of tokens whose score is positive.
        k: The wanted mean number of positive scores per token.
    """
    tokens, experts = scores_TE.shape
    totals = sum_over_processes(torch.cat([counts_E, counts_E.new_full((1,), tokens)])).to(torch.float32)
    share_E = totals[:-1] / (k * totals[-1])
    return experts * (share_E * scores_TE.mean(0)).sum()


class _Loss(NamedTuple):
    """A loss that a field of a Config weighs: its name in a `Routing`, its function and that function's arguments."""

    name: str
    function: Callable[..., Tensor]
    reads: tuple[str, ...]


_LOSSES = {
    "balance_weight": _Loss("load_balance", load_balance_loss, ("probabilities_TE", "counts_E")),
    "z_weight": _Loss("router_z", router_z_loss, ("logits_TE",)),
    "importance_weight": _Loss("importance", importance_loss, ("importance_E",)),
    "load_weight": _Loss("load", load_loss, ("load_E",)),
    "group_balance_weight": _Loss("group_balance", load_balance_loss, ("groups_TG", "counts_G")),
}


class WeightedLosses:
    """The auxiliary losses that a router's Config weighs.

    Args:
        config: A Config with fields `balance_weight`, `z_weight`, `importance_weight`, `load_weight` or
            `group_balance_weight`; a loss whose field is missing or 0 is not computed.
        owner: The router in messages, as in "router topk".

    Raises:
        InputError: A weight is negative.
    """

    def __init__(self, config: Any, owner: str) -> None:
        self.weights: dict[str, float] = {field: getattr(config, field) for field in _LOSSES if hasattr(config, field)}
        at_least(0, owner, **self.weights)

    def __call__(self, **known: Tensor | tuple[Tensor, ...] | Callable[[], Tensor]) -> dict[str, Tensor]:
        """Returns the weighted losses by name.

        Args:
            known: The arguments of the loss functions by name, as in `logits_TE`. A function in the place of a tensor
                is called if a loss reads it.
        """
        losses = {}
        for field, weight in self.weights.items():
            if weight:
                loss = _LOSSES[field]
                given = [known[key] for key in loss.reads]
                losses[loss.name] = weight * loss.function(*[v() if callable(v) else v for v in given])
        return losses
