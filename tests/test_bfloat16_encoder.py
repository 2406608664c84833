"""Encoders in bfloat16 on the CPU: channels last, close to float32, and only where nobody decided otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import liver_and_spleen, volume
from tiny_parts import PARTS, inputs, make_model, needs_package, tiny
from torch import nn
from torch.nn import functional as F

from mome.inference.bfloat16_convolutions import BFloat16Convolutions
from mome.inference.bfloat16_encoder import BFloat16Encoder, with_bfloat16_encoder
from mome.inference.predictor import ModelPredictor

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
LAST = torch.channels_last_3d


def is_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=LAST) and not x.is_contiguous()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv3d(1, 16, 3, padding=1),
        nn.Conv3d(16, 8, 3, padding=1, bias=False),
        nn.Conv3d(12, 9, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 0), dilation=(1, 1, 2)),
        nn.Conv3d(9, 4, 1),
        nn.Conv3d(9, 4, 3, padding="same"),
        nn.ConvTranspose3d(8, 6, 2, stride=2),
        nn.ConvTranspose3d(8, 6, 3, stride=2, padding=1, output_padding=1, bias=False),
    ],
)
def test_convolutions(layer: Any) -> None:
    torch.manual_seed(0)
    for x in (torch.randn(1, layer.in_channels, 7, 8, 9), torch.randn(2, layer.in_channels, 5, 6, 7)):
        with torch.inference_mode():
            expected = layer.double()(x.double())
            layer.float()
            with torch.autocast("cpu", torch.bfloat16), BFloat16Convolutions():
                found = layer(x)
        assert found.dtype == torch.bfloat16 and is_last(found)
        assert (found.double() - expected).norm() < 0.01 * expected.norm()


def test_what_is_left_alone() -> None:
    x, grouped = torch.randn(1, 8, 6, 6, 6), nn.Conv3d(8, 8, 3, groups=2)
    layer = nn.Conv3d(8, 8, 3)

    class Own(torch.Tensor):
        """A user's own tensor."""

    with torch.autocast("cpu", torch.bfloat16), BFloat16Convolutions():
        assert not is_last(layer(x))  # it has gradients
        with torch.no_grad():
            assert is_last(layer(x)) and not is_last(grouped(x))
            assert isinstance(layer(x.as_subclass(Own)), Own)
            assert not is_last(layer(x[0]))  # one map without a batch
            with torch.backends.mkldnn.flags(enabled=False):
                assert not is_last(layer(x))
    with torch.no_grad(), BFloat16Convolutions():
        assert nn.Conv3d(8, 8, 3).double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_instance_norm_of_a_single_map_keeps_channels_last(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.InstanceNorm3d(8, affine=True)
    nn.init.normal_(layer.weight)
    x = (torch.randn(1, 8, 6, 7, 8) + 5).to(dtype).contiguous(memory_format=LAST)
    expected = F.instance_norm(x.double(), None, None, layer.weight.double(), layer.bias.double())
    with torch.no_grad(), BFloat16Convolutions():
        found, several = layer(x), layer(x.expand(2, -1, -1, -1, -1).contiguous(memory_format=LAST))
        tracked = nn.InstanceNorm3d(8, affine=True, track_running_stats=True).eval()
        tracked.running_mean += 5
        kept = tracked(x)
    assert is_last(found) and found.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(several[:1].double(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(kept.double(), x.double() - 5, rtol=2e-2, atol=2e-2)  # by its running statistics


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_package(n)) for n in PARTS["encoder"].names()])
def test_every_encoder_is_close_to_float32(name: str) -> None:
    model = make_model(encoder=tiny("encoder", name))
    given = inputs(model)["volume"]
    with torch.inference_mode():
        expected = model.encoder(given)
        found = with_bfloat16_encoder(model).encoder(given)
    assert all(map_BCDHW.dtype == torch.float32 for map_BCDHW in (*found.maps, found.bottleneck))
    for one, other in zip(found.maps, expected.maps, strict=True):
        assert (one - other).norm() < 0.1 * other.norm()


def test_the_model_and_its_hooks_stay() -> None:
    model = liver_and_spleen().eval()
    seen = []
    model.encoder.register_forward_hook(lambda *call: seen.append(call[2].maps[-1].dtype))
    network = with_bfloat16_encoder(model)
    assert isinstance(network.encoder, BFloat16Encoder) and not isinstance(model.encoder, BFloat16Encoder)
    with torch.inference_mode():
        features = ModelPredictor(model, torch.bfloat16).encode(volume(), (0, 0, 0))
    assert seen == [torch.bfloat16] and features.scales_BSCDHW.dtype == torch.float32
