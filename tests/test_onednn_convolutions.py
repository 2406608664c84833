"""Convolutions of one tile on the CPU: which ones oneDNN computes, and that the numbers are the same."""

from __future__ import annotations

import pytest
import torch
from small_models import liver_and_spleen, volume
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mome.inference.onednn_convolutions import OneDnnConvolutions
from mome.inference.predictor import ModelPredictor

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


class Called(TorchDispatchMode):
    """Counts the calls of oneDNN's convolution by its own name; PyTorch calls it by another one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.mkldnn_convolution.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": (1, 2, 2), "padding": (1, 0, 2), "dilation": 2}])
@pytest.mark.parametrize("bias", [True, False])
def test_small_maps_of_one_image_go_to_onednn(options: dict, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Conv3d(6, 5, 3, bias=bias, **options).eval()
    x = torch.randn(1, 6, 9, 10, 11, generator=generator)
    with torch.inference_mode():
        expected = F.conv3d(x.double(), layer.weight.double(), layer.bias.double() if bias else None, **options)
        with Called() as called, OneDnnConvolutions():
            found = layer(x)
    assert called.count == 1
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_others_stay_with_pytorch() -> None:
    x, weight = torch.randn(1, 4, 6, 6, 6), torch.randn(4, 4, 3, 3, 3)
    large = torch.randn(1, 8, 60, 60, 3)

    def calls(function) -> int:
        with Called() as called, OneDnnConvolutions():
            function()
        return called.count

    with torch.no_grad():
        assert calls(lambda: torch.nn.Conv3d(4, 4, 3).requires_grad_(False)(x)) == 1
        assert calls(lambda: torch.nn.Conv3d(8, 2, 3)(large)) == 0
        assert calls(lambda: torch.nn.Conv3d(4, 4, 3)(x.expand(2, -1, -1, -1, -1))) == 0
        assert calls(lambda: torch.nn.Conv3d(4, 4, 1)(x)) == 0
        assert calls(lambda: torch.nn.Conv3d(4, 4, 3, groups=2)(x)) == 0
        assert calls(lambda: torch.nn.Conv3d(4, 4, 3, padding="same")(x)) == 0
        assert calls(lambda: torch.nn.Conv3d(4, 4, 3).double()(x.double())) == 0
        assert calls(lambda: F.conv3d(x, weight=weight)) == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert calls(lambda: torch.nn.Conv3d(4, 4, 3)(x)) == 0
    layer = torch.nn.Conv3d(4, 4, 3)
    assert calls(lambda: layer(x).sum().backward()) == 0 and layer.weight.grad is not None


class Own(torch.Tensor):
    """A user's own tensor."""


def test_what_a_user_has_chosen_stays() -> None:
    layer, x = torch.nn.Conv3d(4, 4, 3).eval(), torch.randn(1, 4, 6, 6, 6)
    with torch.inference_mode(), Called() as called, OneDnnConvolutions():
        assert isinstance(layer(x.as_subclass(Own)), Own)
        with torch.backends.mkldnn.flags(enabled=False):
            layer(x)
    assert called.count == 0


def test_a_compiled_encoder_is_read_by_the_compiler() -> None:
    """It was not: oneDNN's convolution has no fake tensors, and every tile of a compiled model ended in an error."""
    layer, x = torch.nn.Conv3d(4, 4, 3).eval(), torch.randn(1, 4, 6, 6, 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.inference_mode(), OneDnnConvolutions():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


def test_the_predictor_uses_it() -> None:
    model = liver_and_spleen().eval()
    predictor = ModelPredictor(model)
    with torch.inference_mode(), Called() as called:
        features = predictor.encode(volume(), (0, 0, 0))
        logits = predictor.decode(features, torch.eye(2, 6))
    assert called.count > 0
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(volume(), torch.eye(2, 6)).logits, rtol=1e-4, atol=1e-5)
