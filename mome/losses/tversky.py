"""Tversky loss (Salehi et al. 2017, arXiv 1706.05721), with a focal exponent (Abraham and Khan 2018, 1810.07842)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mome.errors import InputError
from mome.losses.masked import masked, mean_over_present, overlap_sums


class TverskyLoss(nn.Module):
    """(1 − (Σ p·t + s) / (Σ p·t + α Σ p(1 − t) + β Σ (1 − p)t + s))^(1/γ), pooled over the batch as in `bce_dice`.

    The index is that of Salehi et al. 2017 (arXiv 1706.05721), the exponent that of arXiv 1810.07842.
    With α = β = 0.5 and γ = 1 it is the Dice loss, whose smoothing is then 2 s.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `tversky`.

        Args:
            alpha: Weight of false positives.
            beta: Weight of false negatives; more than alpha favours finding small structures.
            gamma: Focal exponent; the loss is raised to 1 / gamma.
            smooth: Added to numerator and denominator, in voxels.
        """

        alpha: float = 0.3
        beta: float = 0.7
        gamma: float = 1.0
        smooth: float = 1.0

    def __init__(self, config: Config) -> None:
        super().__init__()
        shares = (config.alpha, config.beta)
        if min(shares) < 0 or not any(shares) or config.gamma < 1 or config.smooth <= 0:  # without both, the loss is 0
            raise InputError(
                "loss tversky has alpha and beta from 0 and not both 0, gamma from 1 and smooth above 0, got "
                f"{config.alpha:g}, {config.beta:g}, {config.gamma:g}, {config.smooth:g}",
                hint="tversky(alpha=0.3, beta=0.7)",
            )
        self.config = config

    def forward(self, logits: Tensor, targets: Tensor, supervised_BP: Tensor | None = None) -> Tensor:
        config = self.config
        both_P, p_P, t_P, present_P = overlap_sums(masked(logits, targets, supervised_BP))
        below_P = both_P + config.alpha * (p_P - both_P) + config.beta * (t_P - both_P) + config.smooth
        loss_P = 1 - (both_P + config.smooth) / below_P
        if config.gamma != 1:
            # At a loss of 0 the root has an infinite slope.
            loss_P = loss_P.clamp(min=1e-6) ** (1 / config.gamma)
        return mean_over_present(loss_P, present_P)
