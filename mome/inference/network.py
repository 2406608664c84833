"""Makes a network ready for inference from whatever form of a model a user has."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from mome.errors import InputError

_FLOAT16_NOTE = "float16 is about ten times slower than float32 on a CPU, so the network computes in float32"


def unwrapped(model: Any) -> Any:
    """Returns the model inside the wrappers that train on several devices; inference uses one.

    Raises:
        InputError: It is no MoME, or its weights have no values.
    """
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    if not isinstance(model, nn.Module) or not hasattr(model, "config") or not hasattr(model, "encode"):
        raise InputError(
            f"a model is a MoME, or the name or folder of one, got {type(model).__name__}",
            hint="Segmenter('mome-ct-tiny'), or Segmenter(MoME.from_pretrained(…))",
        )
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        # A hook of accelerate brings offloaded weights when the module is called.
        if not hasattr(module, "_hf_hook") and any(tensor is not None and tensor.is_meta for tensor in tensors):
            raise InputError(
                "the model's weights have no values: it was built on the meta device",
                hint="MoME.from_pretrained(…), or model.to_empty(device='cpu') and load_state_dict",
            )
    return model


def without_float16(model: Any, device: torch.device, autocast: torch.dtype | None) -> tuple[Any, Any, list[str]]:
    """Replaces float16, which CPUs emulate, by float32 where the network computes on the CPU.

    The user's model stays as it is: a copy is converted.

    Args:
        model: The model.
        device: Where it computes.
        autocast: Lower precision inside the network, or None.

    Returns:
        The model, the precision, and a note where one of them was replaced.
    """
    if device.type != "cpu":
        return model, autocast, []
    is_half = any(tensor.dtype == torch.float16 for tensor in model.parameters())
    if is_half:
        model = copy.deepcopy(model).float()
    if autocast is torch.float16:
        return model, None, [_FLOAT16_NOTE]
    return model, autocast, [_FLOAT16_NOTE] if is_half else []
