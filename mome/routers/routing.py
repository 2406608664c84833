"""The result of a token router. It takes one of three forms; all of them carry counts and named losses.

Shapes: T tokens, E experts, K experts per token, N assignments; G groups, M tokens of a group, S slots (E · slots per
expert). The tokens of a map (B, D, H, W, C) are its voxels in that order, T = B · D · H · W.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mome.routers.groups import Groups
from mome.routers.slot_attention import slots_of_tokens, tokens_of_slots


@dataclass
class Routing:
    """The fields that all forms share.

    Attributes:
        counts_E: int64, the number of assignments of each expert.
        scores_TE: float32, the router's probability or score of each expert; None where a router has none.
        losses: Auxiliary losses by name, already weighted; empty outside training.
        router: The router that made it; the layer around the router sets it.
        inner: The routing of a nested router, for `Router.observe` of the router around it.
    """

    counts_E: Tensor
    scores_TE: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    router: Any = None
    inner: Routing | None = None

    def gates_TE(self) -> Tensor:
        """The weight of every expert for every token, zero where the expert was not chosen.

        Raises:
            NotImplementedError: The form has no weight per token and expert.
        """
        raise NotImplementedError(f"{type(self).__name__} has no gates per token")


@dataclass(kw_only=True)
class TokenChoice(Routing):
    """Every token goes to the same number K of experts.

    Attributes:
        ids_TK: int64, the experts of each token.
        weights_TK: float32, the weight of each assignment.
    """

    ids_TK: Tensor
    weights_TK: Tensor

    def gates_TE(self) -> Tensor:
        """The weights scattered to the experts' columns; a repeated expert's weights add up."""
        gates = self.weights_TK.new_zeros(self.ids_TK.shape[0], self.counts_E.shape[0])
        return gates.scatter_add(1, self.ids_TK, self.weights_TK)


@dataclass(kw_only=True)
class Assignments(Routing):
    """Every expert gets its own list of tokens; a token may be in none, one or several lists.

    Attributes:
        tokens_N: int64, the token of each assignment, in any order.
        experts_N: int64, the expert of each assignment.
        weights_N: float32, the weight of each assignment.
        tokens: The number T of tokens.
    """

    tokens_N: Tensor
    experts_N: Tensor
    weights_N: Tensor
    tokens: int

    def gates_TE(self) -> Tensor:
        """The weights scattered to their tokens' rows and experts' columns."""
        experts = self.counts_E.shape[0]
        gates = self.weights_N.new_zeros(self.tokens * experts)
        return gates.scatter_add(0, self.tokens_N * experts + self.experts_N, self.weights_N).view(self.tokens, experts)


@dataclass(kw_only=True)
class Slots(Routing):
    """Every expert works on a fixed number of slots, each a mean of the tokens of one group (Soft MoE).

    The logits of tokens and slots are the product of two factors. The matrix (tokens × slots) is not stored: it would
    take S / C times the memory of the tokens. Both ways are computed in pieces, and again in the backward pass.

    Attributes:
        keys_GMC: float32, the factor of each token.
        queries_SC: float32, the factor of each slot. Slots are ordered by expert.
        groups: The groups of tokens.
    """

    keys_GMC: Tensor
    queries_SC: Tensor
    groups: Groups

    def dispatch(self, x_TC: Tensor) -> Tensor:
        """Softmax over the tokens of a group, times the tokens: (T, C) → (G, S, C), in the type of the factors."""
        return slots_of_tokens(self.queries_SC, self.keys_GMC, self.groups.split(x_TC).to(self.keys_GMC.dtype))

    def combine(self, y_GSC: Tensor) -> Tensor:
        """Softmax over all slots, times the results of the slots: (G, S, C) → (T, C), in the type of the factors."""
        return self.groups.join(tokens_of_slots(self.queries_SC, self.keys_GMC, y_GSC.to(self.keys_GMC.dtype)))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Both softmaxes as matrices (G, M, S), over the tokens and over the slots; for inspection of small maps."""
        logits_GMS = self.keys_GMC @ self.queries_SC.T
        return logits_GMS.softmax(dim=1), logits_GMS.softmax(dim=2)


def count_assignments(ids_TK: Tensor, num_experts: int) -> Tensor:
    """(T, K) → (E,) int64, without a host synchronisation."""
    one_TK = torch.ones_like(ids_TK)
    return torch.zeros(num_experts, dtype=torch.int64, device=ids_TK.device).scatter_add_(
        0, ids_TK.flatten(), one_TK.flatten()
    )
