"""Measures the memory that a training step needs per patch voxel."""

from __future__ import annotations

import gc
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mome.modeling import MoME

BYTES_PER_WEIGHT = 16
"""A weight, its gradient and the two moments of Adam, in float32."""
BYTES_PER_AVERAGED_WEIGHT = 4
"""A weight of the moving average, in float32."""


def bytes_per_voxel(model: MoME, prompts: int, device: torch.device | str = "cpu") -> float:
    """Returns the bytes that forward and backward pass keep, per voxel of a patch and case of the batch.

    Tensors that autograd saves are counted on a small patch; they are nearly all of a step's memory and grow with the
    voxels. A half is added for what exists for a moment (our choice; a test compares it with a real step).

    Args:
        model: The model, in training mode or not; its mode stays.
        prompts: Prompts of a step.
        device: Where the step is run.
    """
    side = 4 * max(model.encoder.size_divisor)
    patch = [side] * 3
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    was_training = model.training
    model.train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    volume = torch.zeros(1, 1, *patch, device=device)
    text = torch.zeros(prompts, int(model.config.text_dim or 0), device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(volume, text, torch.zeros(1, prompts, *patch, device=device))
    del result
    gc.collect()
    model.train(was_training)
    total = sum(size for pointer, size in saved.items() if pointer not in parameters)
    return 1.5 * total / math.prod(patch)
