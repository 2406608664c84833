"""Makes a network ready for inference from whatever form of a model a user has."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mome.errors import InputError
from mome.processing import MoMEProcessor, processor_of

_FLOAT16_NOTE = "float16 is about ten times slower than float32 on a CPU, so the network computes in float32"


def network_and_processor(
    model: Any, processor: MoMEProcessor | None, device: torch.device | None
) -> tuple[Any, MoMEProcessor]:
    """Returns the network of a model, on its device, and the processor that makes its input.

    Args:
        model: A MoME, one inside a wrapper (see `unwrapped`), or what `MoME.from_pretrained` accepts.
        processor: The processor; None for the model's own, or the one saved with it.
        device: Where the network computes; None where it stays.

    Raises:
        InputError: The model is no MoME, cannot be loaded or has no values; or the processor is none, is missing, or is
            another one than the model was trained with.
    """
    if processor is not None and not isinstance(processor, MoMEProcessor):
        raise InputError(
            f"processor is a MoMEProcessor, got {type(processor).__name__}",
            hint="MoMEProcessor.from_pretrained(name or folder)",
        )
    if isinstance(model, str | Path):
        from mome.modeling import MoME

        # The model is loaded first, so that an error in the model is reported before one in its processor.
        network: Any = MoME.from_pretrained(model)
        processor = processor or MoMEProcessor.from_pretrained(model)
    else:
        network = unwrapped(model)
        processor = processor or processor_of(network)
    if hasattr(network, "check_processor"):  # a predictor's model may be of another class
        network.check_processor(processor)
    if device is not None:
        nn.Module.to(network, device)
    return network, processor


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


def check_default_device() -> None:
    """Checks that new tensors get values.

    Raises:
        InputError: The default device is `meta`, whose tensors hold no numbers.
    """
    if torch.get_default_device().type == "meta":
        raise InputError(
            "torch's default device is 'meta', whose tensors hold no numbers",
            hint="call this outside of torch.device('meta')",
        )


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has finished what it was given, so that a clock read next includes it; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def checked_device(device: str | torch.device) -> torch.device:
    """Returns a device that computes.

    Raises:
        InputError: There is no such device here, or it holds no numbers, as `meta`.
    """
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"no such device: {device!r:.60}", hint="cpu, cuda, cuda:1") from error
    if chosen.type == "cpu" and chosen.index:
        raise InputError(f"there is one device 'cpu', got {str(chosen)!r}", hint="device='cpu'")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here", hint="device='cpu'")
    try:
        computes = torch.ones(1, device=chosen).add(1).item() == 2
    except Exception as error:  # backends raise errors of many types
        first = (str(error).splitlines() or [""])[0][:120]
        raise InputError(f"the device {str(chosen)!r} cannot be used: {first}", hint="device='cpu'") from error
    if not computes:
        raise InputError(f"the device {str(chosen)!r} does not compute", hint="device='cpu'")
    return chosen
