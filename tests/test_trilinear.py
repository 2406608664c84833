"""Trilinear resizing by matrix products is PyTorch's interpolation."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mome.layers.trilinear import resize


def interpolated(map_BCDHW: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    return F.interpolate(map_BCDHW, size=size, mode="trilinear", align_corners=False)


@pytest.mark.parametrize("size", [(8, 10, 12), (4, 5, 7), (3, 5, 20), (1, 1, 1), (2, 3, 4)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (1, 2, 1, 1, 1), (1, 1, 7, 3, 2)])
def test_it_is_the_interpolation_of_pytorch(shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(resize(x, size), interpolated(x, size), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(resize(x.float(), size), interpolated(x.float(), size), rtol=1e-5, atol=1e-6)


def test_channels_last_and_views_are_read_as_they_are() -> None:
    x = torch.randn(2, 4, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = interpolated(x, (6, 8, 10))
    for given in (x.contiguous(memory_format=torch.channels_last_3d), x.movedim(1, -1).contiguous().movedim(-1, 1)):
        torch.testing.assert_close(resize(given, (6, 8, 10)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision_is_rounded_once(dtype: torch.dtype, autocast: bool) -> None:
    x = torch.randn(1, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = resize(x, (9, 8, 15))
    expected = interpolated(x.double(), (9, 8, 15))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)


def test_its_gradients_are_right() -> None:
    x = torch.randn(1, 2, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda each: resize(each, (5, 6, 8)), [x])


def test_its_products_are_not_counted() -> None:
    """`mome.model_cost` counts products, and a GPU interpolates without any."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counted:
        assert resize(torch.empty(1, 2, 3, 4, 5), (6, 8, 10)).shape == (1, 2, 6, 8, 10)
    assert counted.get_total_flops() == 0


def test_a_map_of_this_size_is_returned_as_it_is() -> None:
    x = torch.randn(1, 2, 3, 4, 5)
    assert resize(x, x.shape[2:]) is x
