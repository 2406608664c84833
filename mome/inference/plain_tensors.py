"""Says which tensors may go to oneDNN in place of PyTorch's own code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

_TYPES = (torch.float32, torch.bfloat16)


def plain_on_cpu(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = _TYPES) -> bool:
    """Whether all tensors are strided ones of PyTorch itself, on the CPU and of these types, outside of autograd.

    Also False where the user has switched oneDNN off.
    """
    if torch.is_grad_enabled() or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    return all(
        type(tensor) in (Tensor, Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype in dtypes
        and tensor.layout == torch.strided
        for tensor in given
    )
