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

# Without oneDNN, layers are left as they are; all other tests of this file hold there, too.
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
LAST = torch.channels_last_3d


def is_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=LAST) and not x.is_contiguous()


@needs_onednn
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


@needs_onednn
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
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == torch.float32  # a part that leaves autocast
            assert nn.Conv3d(8, 8, 3).double()(x.double()).dtype == torch.float64


@needs_onednn
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
        with torch.autocast("cpu", torch.bfloat16):
            plain = model.encoder(given)
        found = with_bfloat16_encoder(model).encoder(given)
    assert all(map_BCDHW.dtype == torch.float32 for map_BCDHW in (*found.maps, found.bottleneck))
    for one, usual, other in zip(found.maps, plain.maps, expected.maps, strict=True):
        assert one.is_contiguous()
        # no further from float32 than autocast alone, up to chance
        assert (one - other).norm() < 2 * (usual - other).norm() + 0.01 * other.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_type(dtype: torch.dtype) -> None:
    """Experts of another type than their maps ended in an error of PyTorch."""
    model, text = liver_and_spleen().eval(), torch.eye(2, 6)
    with torch.inference_mode():
        expected = model(volume(), text).logits
        predictor = ModelPredictor(model.to(dtype), torch.bfloat16)
        found = predictor.decode(predictor.encode(volume(), (0, 0, 0)), text)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


@needs_onednn
def test_a_group_norm_keeps_its_digits() -> None:
    layer, x = nn.GroupNorm(8, 8), (torch.randn(1, 8, 24, 24, 24) + 30).contiguous(memory_format=LAST)
    expected = F.group_norm(x.double(), 8)
    with torch.no_grad(), BFloat16Convolutions():
        torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-4)


def test_an_encode_that_was_set_on_the_model_is_under_autocast() -> None:
    """It is bound to the model, not to the copy with the other encoder, and would compute in float32."""
    model, seen = liver_and_spleen().eval(), []
    model.encoder.register_forward_hook(lambda *call: seen.append(call[2].maps[-1].dtype))
    inner = model.encode
    model.encode = lambda *given: inner(*given)
    with torch.inference_mode():
        ModelPredictor(model, torch.bfloat16).encode(volume(), (0, 0, 0))
    assert seen == [torch.bfloat16]


def test_attributes_of_the_encoder_are_there() -> None:
    model = liver_and_spleen().eval()
    encoder = with_bfloat16_encoder(model).encoder
    assert encoder.channels == model.encoder.channels and encoder.size_divisor == model.encoder.size_divisor
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = encoder.no_such_attribute


def test_the_model_and_its_hooks_stay() -> None:
    model = liver_and_spleen().eval()
    seen = []
    model.encoder.register_forward_hook(lambda *call: seen.append(call[2].maps[-1].dtype))
    network = with_bfloat16_encoder(model)
    assert isinstance(network.encoder, BFloat16Encoder) and not isinstance(model.encoder, BFloat16Encoder)
    with torch.inference_mode():
        features = ModelPredictor(model, torch.bfloat16).encode(volume(), (0, 0, 0))
    assert seen == [torch.bfloat16] and features.scales_BSCDHW.dtype == torch.float32
