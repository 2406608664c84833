"""The decay of a moving average of weights (EMA), which grows with the steps that the average has seen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

Tensors = tuple[Tensor, ...] | list[Tensor]
Update = Callable[[Tensors, Tensors, Tensor | int], None]


def growing_average(decay: float) -> Update:
    """Returns the update of `torch.optim.swa_utils.AveragedModel` for an average with a warm-up.

    The decay of update n is min(decay, (1 + n) / (10 + n)), as in TensorFlow's `ExponentialMovingAverage` and timm's
    `ModelEmaV3`. With a constant one of 0.995, more than half of the average of a run of 100 steps would be the first,
    random weights.

    Args:
        decay: Of the exponential moving average, between 0 and 1.
    """

    @torch.no_grad()
    def update(averages: Tensors, news: Tensors, number: Tensor | int) -> None:
        count = int(number)
        get_ema_multi_avg_fn(min(decay, (1 + count) / (10 + count)))(averages, news, count)

    return update
