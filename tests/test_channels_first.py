"""The linear layer whose result lies channels first in memory computes what `nn.Linear` does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mome.layers.channels_first import ChannelsFirstLinear


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 4, 6, 5), (1, 9, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_a_linear_layer(shape: tuple[int, ...], bias: bool) -> None:
    layer, plain = ChannelsFirstLinear(5, 3, bias=bias).double(), nn.Linear(5, 3, bias=bias).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    y, expected = layer(x), plain(again)
    torch.testing.assert_close(y, expected)
    (y.square().sum() + expected.square().sum()).backward()
    torch.testing.assert_close(x.grad, again.grad)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    if y.ndim > 2:
        assert y.movedim(-1, 1).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision(dtype: torch.dtype) -> None:
    layer = ChannelsFirstLinear(5, 3)
    with torch.autocast("cpu", dtype=dtype):
        assert layer(torch.randn(1, 4, 4, 4, 5)).dtype == dtype
    assert layer.to(dtype)(torch.randn(2, 4, 4, 4, 5, dtype=dtype)).dtype == dtype
