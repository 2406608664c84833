"""oneDNN for the convolutions of a single tile on the CPU.

For one image of at most 20,480 numbers per slice of all channels, PyTorch takes a convolution of its own in place of
oneDNN's (`use_mkldnn` in `aten/src/ATen/native/Convolution.cpp`). A tile is one image, and the maps of most layers are
that small. With oneDNN for these too, the encoders of mome-ct-tiny and mome-ct-torso-tiny took 0.96 and 0.67 of the
time on two cores (`benchmarks/encoder_convolutions.py`, torch 2.14).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mome.inference.plain_tensors import plain_on_cpu

# Products of batch size, channels, and the first two sides up to this go to PyTorch's own convolution.
_SMALL = 20_480


class OneDnnConvolutions(TorchFunctionMode):
    """Within this context, 3-D convolutions that PyTorch would compute by its own code are computed by oneDNN.

    Only float32 without gradients, without groups, and outside of autocast. Sums are rounded in another order. Code
    that is being compiled and subclasses of `Tensor` are left alone, and everything is where the user has switched
    oneDNN off (`torch.backends.mkldnn`).
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls a function of torch, or oneDNN in its place."""
        # A user's compiled encoder is traced through this function; the compiler cannot read oneDNN's convolution.
        if torch.compiler.is_compiling():
            return function(*args, **(kwargs or {}))
        if function is F.conv3d and not kwargs and len(args) == 7 and _goes_to_pytorch(*args):
            volume, weight, bias, stride, padding, dilation, groups = args
            return torch.ops.aten.mkldnn_convolution(
                volume, weight, bias, list(padding), list(stride), list(dilation), groups
            )
        return function(*args, **(kwargs or {}))


def _goes_to_pytorch(
    volume: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    """Whether PyTorch computes this convolution by its own code, and oneDNN could compute it."""
    lists = all(isinstance(value, tuple) and len(value) == 3 for value in (stride, padding, dilation))
    plain = plain_on_cpu(volume, weight, bias, dtypes=(torch.float32,)) and not torch.is_autocast_enabled("cpu")
    if not (lists and plain and groups == 1 and volume.dim() == 5 and volume.shape[0] == 1):
        return False
    # Of kernels of one voxel, both are equally fast.
    return max(weight.shape[2:]) > 1 and volume.shape[1] * volume.shape[2] * volume.shape[3] <= _SMALL
