"""Which experts of a map have to run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def experts_to_run(gates_BDHWE: Tensor, training: bool) -> Sequence[int]:
    """The experts that have a gate other than zero at some voxel; all of them in training and in traced programs.

    An expert whose gates are all zero adds zeros, as long as its results are finite, so that leaving it out changes
    no value. Where gradients are recorded it runs, because data-parallel training wants a gradient for every
    parameter. A traced program (torch.compile, torch.export) must not depend on values, and the meta device has none.

    Args:
        gates_BDHWE: The weight of every expert at every voxel. Its values are read, which waits for the device.
        training: Whether the layer is in training.
    """
    experts = range(gates_BDHWE.shape[-1])
    if training or torch.is_grad_enabled() or torch.compiler.is_compiling() or gates_BDHWE.is_meta or len(experts) == 1:
        return experts
    return [expert for expert, used in enumerate((gates_BDHWE != 0).flatten(0, -2).any(0).tolist()) if used]
