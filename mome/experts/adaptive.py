"""Experts that compute, beside experts that cost nothing: a token takes as much computation as its router gives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mome.errors import InputError
from mome.experts.base import TokenExperts
from mome.experts.constant import ConstantExperts
from mome.experts.nested import build_token_experts
from mome.experts.rows import sum_rows, take_rows
from mome.registry import at_least, part


class AdaptiveExperts(TokenExperts):
    """Nested experts with zero, identity and constant experts beside them (MoE++, Jin et al. 2024, arXiv 2410.07348).

    The ids are, in this order, those of the nested experts, of the constant experts (a₁ · x + a₂ · v), of the identity
    experts (x) and of the zero experts (0). With `constant=0, zero=0` these are the zero experts of LongCat-Flash,
    which are identities with the ids after those of its other experts.

    A token's assignments to other than nested experts never become rows of the nested experts' products. Selecting the
    rows waits for the device, and its result has a size that depends on values.

    The weights of zero experts are set to 0, and a token's other weights are scaled to the sum that all of its weights
    had. Where a router's weights have a sum of one this is MoE++'s order, in which weights are normalised after those
    of zero experts are 0; a router that does not normalise keeps its scale. A token that has only zero experts gets 0.
    Where each assignment is a token of its own (`expert_choice`, `depth`, `relu`) nothing is scaled.

    Of MoE++ these are left out: the gating residual (router logits that depend on those of the layer before), which
    belongs to routers; the loss and capacities by type of expert; and the multiplication of x by k.
    """

    routed_part = "experts"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `adaptive`; the numbers of extra experts are those of MoE++'s code.

        Args:
            experts: The experts that compute; they read tokens.
            zero: Number of zero experts.
            identity: Number of identity experts.
            constant: Number of constant experts.
            renormalize: Whether a token's other weights are scaled up where it has zero experts. Without it, a zero
                expert takes its share of the result away.
        """

        experts: Any = part("experts", "swiglu(n=8)")
        zero: int = 1
        identity: int = 1
        constant: int = 2
        renormalize: bool = True

    def __init__(self, config: Config, *, dim: int) -> None:
        super().__init__()
        at_least(0, "adaptive experts", zero=config.zero, identity=config.identity, constant=config.constant)
        if not (config.zero or config.identity or config.constant):
            raise InputError(
                "experts 'adaptive' have no zero, identity or constant expert beside their nested experts",
                hint=f"use the nested experts alone, as in experts={config.experts['name']}",
            )
        self.experts = build_token_experts(config.experts, dim=dim, owner="adaptive", argument="experts")
        self.constants = (
            ConstantExperts(ConstantExperts.Config(n=config.constant), dim=dim) if config.constant else None
        )
        self.nested, self.constant, self.identity = self.experts.num_experts, config.constant, config.identity
        self.first_zero = self.nested + config.constant + config.identity
        self.num_experts = self.first_zero + config.zero
        self.renormalize = config.renormalize

    def forward(self, x_TD: Tensor, ids_TK: Tensor | None, weights_TK: Tensor | None) -> Tensor:
        assert ids_TK is not None and weights_TK is not None
        weights_TK = self._without_zero_experts(ids_TK, weights_TK)
        y_TD = self._computed(x_TD, ids_TK, weights_TK)
        first = self.nested
        if self.constants is not None:
            own_TK = (ids_TK >= first) & (ids_TK < first + self.constant)
            own_ids_TK = (ids_TK - first).clamp(0, self.constant - 1)
            y_TD = y_TD + self.constants(x_TD, own_ids_TK, weights_TK * own_TK)
        if self.identity:
            own_TK = (ids_TK >= first + self.constant) & (ids_TK < self.first_zero)
            y_TD = y_TD + (weights_TK * own_TK).sum(-1, keepdim=True) * x_TD
        return y_TD.to(x_TD.dtype)

    def _computed(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum of the nested experts, (T, D), in float32 at least."""
        token_N, place_N = self.nested_assignments(ids_TK)
        ids_N, weights_N = ids_TK[token_N, place_N], weights_TK[token_N, place_N]
        y_ND = self.experts(take_rows(x_TD, token_N), ids_N[:, None], weights_N[:, None])
        return sum_rows(y_ND, token_N, x_TD.shape[0])

    def nested_assignments(self, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The assignments to nested experts: the token (N,) and the place among its K experts (N,) of each."""
        token_N, place_N = (ids_TK < self.nested).nonzero(as_tuple=True)
        return token_N, place_N

    def _without_zero_experts(self, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weights with those of zero experts set to 0 and the others scaled."""
        kept_TK = weights_TK * (ids_TK < self.first_zero)
        if not self.renormalize:
            return kept_TK
        sum_T1 = kept_TK.sum(-1, keepdim=True)
        sum_T1 = torch.where(sum_T1 == 0, 1, sum_T1)  # nothing is left, and 0 stays 0
        return kept_TK / sum_T1 * weights_TK.sum(-1, keepdim=True)
