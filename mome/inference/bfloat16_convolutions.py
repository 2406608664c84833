"""Convolutions of a network in bfloat16 on the CPU, with channels last in memory.

oneDNN multiplies bfloat16 fast where the channels of a voxel lie together (AMX): a convolution of 32 to 16 channels
over 64³ voxels took 4 ms so and 12 ms otherwise, on two cores (torch 2.14). PyTorch keeps maps as they come, and its
instance norm brings them back to channels first, so this mode decides for convolutions and norms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mome.inference.plain_tensors import plain_on_cpu

# Below this number of input channels, oneDNN is faster in float32 (the first convolution of a CT has one).
_FEW_CHANNELS = 8


class BFloat16Convolutions(TorchFunctionMode):
    """Within this context, 3-D convolutions of CPU tensors return bfloat16 with channels last.

    So do transposed convolutions. The instance norm of a single map with channels last keeps it so; a group norm gets
    channels first, because PyTorch's loses digits otherwise. Only under bfloat16 autocast, without gradients and
    groups, as `torch.nn` calls these functions; other code, subclasses of `Tensor` and what the user has switched off
    (`torch.backends.mkldnn`) are left alone.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls a function of torch, with its tensors in bfloat16 and channels last where it is one of these layers."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if function is F.conv3d and not kwargs and len(args) == 7 and _takes(args[:3], args[6]):
            volume, weight, bias, *rest = args
            dtype = torch.float32 if volume.shape[1] < _FEW_CHANNELS else torch.bfloat16
            with torch.autocast("cpu", enabled=False):
                result = function(*_channels_last(dtype, volume, weight, bias), *rest)
            # PyTorch's own convolution in float32 does not keep channels last.
            return result.to(torch.bfloat16, memory_format=torch.channels_last_3d)
        if function is F.conv_transpose3d and not kwargs and len(args) == 8 and _takes(args[:3], args[6]):
            with torch.autocast("cpu", enabled=False):
                return function(*_channels_last(torch.bfloat16, *args[:3]), *args[3:])
        if function is F.instance_norm and len(args) == 1 and _normalises(args[0], **kwargs):
            # Of one map, an instance norm is a batch norm, and the batch norm of PyTorch knows channels last.
            weight, bias, eps = kwargs["weight"], kwargs["bias"], kwargs["eps"]
            return F.batch_norm(args[0], None, None, weight, bias, training=True, eps=eps)
        if function is F.group_norm and plain_on_cpu(args[0]):
            return function(args[0].contiguous(), *args[1:], **kwargs)
        return function(*args, **kwargs)


def _takes(tensors: Sequence[Any], groups: int) -> bool:
    """Whether a convolution of this volume with this weight and bias is one of these."""
    lowers = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    return lowers and groups == 1 and tensors[0].dim() == 5 and plain_on_cpu(*tensors)


def _normalises(volume: Tensor, running_mean: Tensor | None, use_input_stats: bool, **others: Any) -> bool:
    """Whether the map is one with channels last, and its own statistics normalise it."""
    single = volume.dim() == 5 and volume.shape[0] == 1 and volume[0, 0].numel() > 1
    is_plain = plain_on_cpu(volume, others["weight"], others["bias"])
    last = single and not volume.is_contiguous() and volume.is_contiguous(memory_format=torch.channels_last_3d)
    return last and is_plain and running_mean is None and use_input_stats


def _channels_last(
    dtype: torch.dtype, volume: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    layout = torch.channels_last_3d
    volume, weight = volume.to(dtype, memory_format=layout), weight.to(dtype, memory_format=layout)
    return volume, weight, None if bias is None else bias.to(dtype)
