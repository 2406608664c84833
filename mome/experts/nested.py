"""Builds and runs token experts that stand inside other experts."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.experts.base import TokenExperts
from mome.registry import EXPERTS


def build_token_experts(
    spec: dict[str, Any], *, dim: int, owner: str, argument: str, count: int | None = None
) -> TokenExperts:
    """Builds the token experts that a composition holds.

    Args:
        spec: The nested spec, in its canonical form.
        dim: Width of the tokens.
        owner: The name of the composition, for errors.
        argument: The name of its argument, for errors.
        count: The number of experts that the composition needs; None for any.

    Raises:
        InputError: The experts read maps or prompts, have an always-on part, or are not as many as needed.
    """
    expert_class, _ = EXPERTS.resolve(spec)
    name, where = spec["name"], f"argument '{argument}' of experts '{owner}'"
    if expert_class.reads != "tokens":
        reads = "read whole maps" if expert_class.reads == "map" else "read the prompt"
        raise InputError(
            f"{argument}={name} of experts '{owner}': experts '{name}' {reads}, and single tokens are needed here",
            where=where,
            hint=f"use experts that read tokens, as in {owner}({argument}=swiglu(n={count or 8}))",
        )
    built = cast("TokenExperts", EXPERTS.build(spec, dim=dim))
    if built.always_on is not None:
        raise InputError(
            f"{argument}={name} of experts '{owner}': experts '{name}' have an always-on part, which stands outermost",
            where=where,
            hint=f"swap them, as in {name}(routed={owner}(…))",
        )
    if count is not None and built.num_experts != count:
        raise InputError(
            f"{argument} of experts '{owner}' is {count} expert, got {built.num_experts}",
            where=where,
            hint=f"{owner}({argument}={name}(n={count}, …)); a larger `hidden` makes a feed-forward expert stronger",
        )
    return built


def run_on_every_token(expert: nn.Module, x_TD: Tensor, weights_T1: Tensor | None, *, dense: bool) -> Tensor:
    """weight · expert(x) for every token: (T, D) → (T, D).

    Args:
        expert: One token expert, or an adapter around it.
        x_TD: The tokens.
        weights_T1: One weight per token, of any floating type; one where None.
        dense: The expert's `dense_when_single`, which an adapter around it lacks.
    """
    if dense:
        y_TD = expert(x_TD, None, None)
        return y_TD if weights_T1 is None else (weights_T1 * y_TD).to(y_TD.dtype)
    ids_T1 = torch.zeros(x_TD.shape[0], 1, dtype=torch.int64, device=x_TD.device)
    if weights_T1 is None:
        weights_T1 = torch.ones(ids_T1.shape, dtype=torch.float32, device=x_TD.device)
    return cast("Tensor", expert(x_TD, ids_T1, weights_T1))
