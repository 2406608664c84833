"""Our instance norm beside PyTorch's in float64: values and gradients, in every layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mome.layers.instance_norm import InstanceNorm

LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last_3d}


def norm(channels: int = 6) -> InstanceNorm:
    torch.manual_seed(0)
    layer = InstanceNorm(channels)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def results(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, layer.weight, layer.bias], grad)]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(batch: int, layout: str, grad_layout: str, dtype: torch.dtype) -> None:
    """PyTorch's own gives wrong gradients for a batch of one whose gradient has channels last."""
    layer = norm()
    exact = nn.InstanceNorm3d(6, affine=True).double()
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    x = (torch.randn(batch, 6, 5, 6, 7) + 3).to(dtype)
    grad = torch.randn(batch, 6, 5, 6, 7).to(dtype)
    given = x.contiguous(memory_format=LAYOUTS[layout]), grad.contiguous(memory_format=LAYOUTS[grad_layout])
    expected, found = results(exact, x.double(), grad.double()), results(layer, *given)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).abs().max() <= bound * other.abs().max()
    assert found[0].dtype == dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_large_mean_costs_no_digits_without_gradients(layout: str, batch: int) -> None:
    """PyTorch's group norm with channels last is wrong by 0.02 here."""
    layer = norm(16)
    x = (torch.randn(batch, 16, 24, 24, 24) + 30).contiguous(memory_format=LAYOUTS[layout])
    expected = nn.functional.instance_norm(x.double(), None, None, layer.weight.double(), layer.bias.double())
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-4)


def test_a_single_voxel_and_a_map_without_a_batch_are_as_in_pytorch() -> None:
    layer, x = norm(), torch.randn(6, 6, 5, 4)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        layer(torch.randn(2, 6, 1, 1, 1))
    expected = nn.functional.instance_norm(x[None].double(), None, None, layer.weight.double(), layer.bias.double())
    torch.testing.assert_close(layer(x).double(), expected[0], rtol=1e-5, atol=1e-5)


def test_it_is_an_instance_norm_for_whoever_looks() -> None:
    """Initialisation, converters and the check of one voxel look for the class and its names."""
    layer = norm()
    assert isinstance(layer, nn.InstanceNorm3d) and list(layer.state_dict()) == ["weight", "bias"]
