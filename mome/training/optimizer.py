"""AdamW for a model, and its learning rate at every step."""

from __future__ import annotations

import math

import torch
from torch import nn

from mome.training.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Returns AdamW with weight decay for matrices and convolution kernels; other parameters do not decay.

    Parameters without gradients are left out.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Returns the learning rate of one step: a linear warm-up, then a cosine to zero.

    It depends on the step alone, so a resumed run needs no scheduler state.

    Args:
        step: Number of the step, from 0.
        steps: Steps of the whole run.
        peak: Largest learning rate.
        warmup: Share of the steps that warm up.
    """
    warm = max(1, round(steps * warmup))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
