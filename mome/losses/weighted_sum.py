"""A sum of other losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mome.errors import InputError
from mome.registry import LOSSES, part


class WeightedSum(nn.Module):
    """Σ wᵢ · lossᵢ, as in `weighted_sum(losses=[tversky, focal(gamma=2.0)], weights=[1.0, 0.5])`; our choice."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `weighted_sum`.

        Args:
            losses: The losses.
            weights: One weight per loss, at least 0 and not all 0; empty weighs all 1.
        """

        losses: tuple[Any, ...] = part("losses", ())
        weights: tuple[float, ...] = ()

    def __init__(self, config: Config) -> None:
        super().__init__()
        weights = config.weights or (1.0,) * len(config.losses)
        if not config.losses or len(weights) != len(config.losses):
            raise InputError(
                f"loss weighted_sum has {len(config.losses)} losses and {len(config.weights)} weights",
                hint="weighted_sum(losses=[tversky, focal], weights=[1.0, 0.5])",
            )
        if min(weights) < 0 or not any(weights):  # what is better would be punished, or nothing learned
            raise InputError(
                f"loss weighted_sum has weights of at least 0, not all 0, got {list(weights)}",
                hint="weighted_sum(losses=[tversky, focal], weights=[1.0, 0.5])",
            )
        self.losses = nn.ModuleList([LOSSES.build(loss) for loss in config.losses])
        if any(getattr(loss, "reads_scales", False) for loss in self.losses):
            raise InputError(
                "deep_supervision stands around a weighted_sum, not in it",
                hint="deep_supervision(loss=weighted_sum(losses=[tversky, focal]))",
            )
        self.weights = tuple(weights)

    def forward(self, logits: Tensor, targets: Tensor, supervised_BP: Tensor | None = None) -> Tensor:
        terms = [
            weight * loss(logits, targets, supervised_BP)
            for loss, weight in zip(self.losses, self.weights, strict=True)
        ]
        return sum(terms[1:], terms[0])
