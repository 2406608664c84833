"""A linear layer whose result lies channels first in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelsFirstLinear(nn.Linear):
    """y = W x + b as in `nn.Linear`, (…, in) → (…, out); in memory the channels come before the voxels.

    A map that is moved to channels first afterwards, as the fusion wants it, then needs no copy: on the CPU the product
    and the copy take three times as long as this product. Adapters and offloading treat it as any linear layer.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim < 3:
            return super().forward(input)
        x_BDV = input.flatten(1, -2).transpose(1, 2)
        weight_BCD = self.weight.expand(x_BDV.shape[0], -1, -1)
        if self.bias is None:
            y_BCV = torch.bmm(weight_BCD, x_BDV)
        else:
            y_BCV = torch.baddbmm(self.bias[:, None], weight_BCD, x_BDV)
        return y_BCV.transpose(1, 2).unflatten(1, input.shape[1:-1])
