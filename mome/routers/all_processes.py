"""Sums over all processes of a distributed run; one process alone gets its own values back."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes; it has no gradient.

    Every process must call it, with a tensor of the same shape and type.
    """
    total = values.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


def differentiable_sum_over_processes(values: Tensor) -> Tensor:
    """The sum over all processes, for losses that are no sum over tokens.

    Data-parallel training averages the gradients of W processes. The gradient of the result is therefore W times that
    of this process's own values: the average is then the gradient that one process with all tokens would compute.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    return sum_over_processes(values) + dist.get_world_size() * (values - values.detach())
