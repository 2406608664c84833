"""The instance norm of our convolutional networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InstanceNorm(nn.InstanceNorm3d):
    """Instance norm (Ulyanov et al. 2016, arXiv 1607.08022) with weight and bias, (B, C, D, H, W) → the same shape.

    On the CPU it is computed as a group norm of one channel per group, which is the same: PyTorch's instance norm takes
    four times as long there, and gives wrong gradients where the gradient of a single map comes with channels last
    (torch 2.14). PyTorch's group norm with channels last loses digits where a mean is large, so it is not used.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True)

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or input.dim() != 5 or input.shape[2:].numel() < 2:
            return super().forward(input)  # it refuses a single voxel
        if not (input.is_contiguous() or torch.is_grad_enabled()):
            return super().forward(input)  # `mome.inference.bfloat16_convolutions` takes maps with channels last
        return F.group_norm(input.contiguous(), self.num_features, self.weight, self.bias, self.eps)
