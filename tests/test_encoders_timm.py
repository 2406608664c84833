"""`timm`: features equal to timm's own, slices and inflated kernels, and the promises of every encoder."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import timm
import torch
from small_models import small
from torch import nn
from torch.nn import functional as F

from mome import MoME
from mome.encoders.timm import Timm
from mome.encoders.timm_weights import load_timm_weights
from mome.errors import InputError
from mome.registry import ENCODERS

# Small networks of timm, made for its own tests.
CONVNEXT = "timm(model='test_convnext', levels=[0, 1, 2], stem=4)"
RESNET = "timm(model='test_resnet', levels=[0, 1, 2], stem=4)"
VIT = "timm(model='test_vit', stem=4)"
SWIN = "timm(model='swin_tiny_patch4_window7_224', levels=[0], stem=4)"
INFLATED = "timm(model='test_resnet', mode='inflate', levels=[0, 1, 2], stem=0)"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a config must not download anything")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def built(spec: str) -> Timm:
    torch.manual_seed(0)
    return small(encoder=spec, patch_size=[64, 64, 8] if "inflate" not in spec else [16, 16, 16]).encoder


def source_of(encoder: Timm) -> nn.Module:
    """timm's own network, with weights of its own; batch norms get averages that are not those of a new network."""
    levels = {"out_indices": tuple(sorted(encoder.config.levels))} if encoder.config.levels else {}
    sizes = {"strict_img_size": False} if "swin" in encoder.config.model else {}
    sizes |= {"dynamic_img_size": True} if "vit" in encoder.config.model else {}
    torch.manual_seed(1)
    network = timm.create_model(
        encoder.config.model, features_only=True, in_chans=encoder.network_channels, **levels, **sizes
    )
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    return network.eval()


def normalised(x: torch.Tensor, model: str) -> torch.Tensor:
    settings = timm.get_pretrained_cfg(model)
    return (x - sum(settings.mean) / len(settings.mean)) / (sum(settings.std) / len(settings.std))


@pytest.mark.parametrize("spec", [CONVNEXT, RESNET, VIT, SWIN], ids=["convnext", "resnet", "vit", "swin"])
def test_the_features_of_each_slice_are_those_of_timm(spec: str) -> None:
    encoder = built(spec)
    source = source_of(encoder)
    assert set(load_timm_weights(encoder, source)) == set(encoder.network.state_dict())
    x = torch.rand(2, 1, 64, 96, 3)
    with torch.no_grad():
        features = encoder.features(x)
        for at in range(3):
            for got, want in zip(features, source(normalised(x[..., at], encoder.config.model)), strict=True):
                if "swin" in spec:
                    want = want.movedim(-1, 1)
                assert got[..., at].shape == want.shape and (got[..., at] - want).abs().max() < 1e-5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_lie_across_the_axis_and_see_their_neighbours(axis: int) -> None:
    encoder = built(f"timm(model='test_resnet', levels=[0, 1], slice_axis={axis}, neighbours=1)").eval()
    source = source_of(encoder)
    load_timm_weights(encoder, source)
    sides = [32, 64]
    sides.insert(axis, 4)
    x = torch.rand(1, 1, *sides)
    with torch.no_grad():
        features, pyramid = encoder.features(x), encoder(x)
        for at in range(4):
            three = [x.select(2 + axis, min(max(at + i, 0), 3)) for i in (-1, 0, 1)]
            for got, want in zip(features, source(normalised(torch.cat(three, dim=1), "test_resnet")), strict=True):
                assert (got.select(2 + axis, at) - want).abs().max() < 1e-5
    assert all(stride[axis] == 1 for stride in encoder.strides) and encoder.size_divisor[axis] == 1
    assert max(encoder.strides[0]) == 2 and max(encoder.size_divisor) == 4
    for map_BCDHW, channels, stride in zip(pyramid.maps, encoder.channels, encoder.strides, strict=True):
        assert map_BCDHW.shape == (1, channels, *(n // s for n, s in zip(sides, stride, strict=True)))


@pytest.mark.parametrize(
    ("model", "axis", "levels"),
    [("test_resnet", 2, [0, 1, 2]), ("resnet18", 0, [0, 1, 2]), ("regnetx_002", 1, [0, 1]), ("vgg11_bn", 2, [0, 1])]
    + [pytest.param(name, 2, [0, 1, 2, 3], marks=pytest.mark.wide)
       for name in ("densenet121", "resnext50_32x4d", "resnet50d")],
)  # fmt: skip
def test_a_constant_volume_gives_the_inflated_network_timms_features(model: str, axis: int, levels: list[int]) -> None:
    """The slices are all the same, and the borders along the third axis are repeated, where timm pads in a slice."""
    spec = f"timm(model='{model}', mode='inflate', slice_axis={axis}, levels={levels}, stem=0)"
    encoder = ENCODERS.build(spec, in_channels=1).eval()
    source = source_of(encoder)
    load_timm_weights(encoder, source)
    for layer in encoder.network.modules():
        if isinstance(layer, nn.Conv3d | nn.AvgPool3d) and max(_triple(layer.padding)) > 0:
            layer.register_forward_pre_hook(_repeat_borders(axis, layer))
    image = torch.rand(1, 1, 32, 64)
    x = image.unsqueeze(2 + axis).repeat_interleave(16, dim=2 + axis)
    with torch.no_grad():
        for got, want in zip(encoder.features(x), source(normalised(image, model)), strict=True):
            difference = got - want.unsqueeze(2 + axis)
            assert difference.abs().max() < 1e-5 * max(1.0, want.abs().max())
            assert got.shape[2 + axis] == 16 // (32 // want.shape[2])


def _triple(padding: int | tuple[int, ...]) -> tuple[int, ...]:
    return (padding,) * 3 if isinstance(padding, int) else tuple(padding)


def _repeat_borders(axis: int, layer: nn.Module):
    amount = _triple(layer.padding)[axis]
    layer.padding = tuple(0 if i == axis else p for i, p in enumerate(_triple(layer.padding)))

    def hook(module: nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
        pads = [0] * 6
        pads[2 * (2 - axis)] = pads[2 * (2 - axis) + 1] = amount
        return F.pad(given[0], pads, mode="replicate")

    return hook


def test_an_inflated_kernel_is_the_flat_one_repeated_and_divided() -> None:
    encoder = built(INFLATED)
    source = source_of(encoder)
    load_timm_weights(encoder, source)
    flat, solid = source.conv1[0].weight, encoder.network.conv1[0].weight
    assert solid.shape == (*flat.shape, 3)
    for at in range(3):
        torch.testing.assert_close(solid[..., at], flat / 3)


def test_a_vision_transformer_gets_four_strides_from_its_last_map() -> None:
    encoder = built(VIT)
    assert encoder.strides == ((16, 16, 1), (8, 8, 1), (4, 4, 1), (1, 1, 1)) and encoder.size_divisor == (32, 32, 1)
    assert encoder.channels == (64, 32, 16, 4) and encoder.bottleneck_channels == 64
    last = torch.randn(1, 64, 4, 6, 5)
    maps = encoder.pyramid(last)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 16, 24, 5), (32, 8, 12, 5), (64, 4, 6, 5), (64, 2, 3, 5)]
    assert torch.equal(maps[2], last)
    torch.testing.assert_close(maps[3], last.unflatten(2, (2, 2)).unflatten(4, (3, 2)).amax((3, 5)))


def run(spec: str, checkpointing: bool = False) -> MoME:
    model = small(encoder=spec, patch_size=[64, 64, 8] if "inflate" not in spec else [16, 16, 16]).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    sides = (32, 64, 3) if "inflate" not in spec else (16, 16, 24)
    given = torch.rand(1, 1, *sides, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    output = model(given, rows, torch.ones(1, 2, *sides))
    assert output.logits.shape == (1, 2, *sides)
    output.loss.backward()
    return model


@pytest.mark.parametrize("spec", [CONVNEXT, RESNET, VIT, INFLATED], ids=["convnext", "resnet", "vit", "inflated"])
def test_checkpointing_changes_no_gradient_and_no_running_average(spec: str) -> None:
    plain, repeated = run(spec), run(spec, True)
    for (name, p), q in zip(plain.named_parameters(), repeated.named_parameters(), strict=True):
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        torch.testing.assert_close(q[1].grad, p.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), repeated.buffers(), strict=True):
        assert torch.equal(a, b), name
    counts = [b for name, b in plain.named_buffers() if name.endswith("num_batches_tracked")]
    assert bool(counts) == ("resnet" in spec) and all(int(count) == 1 for count in counts)


@pytest.mark.parametrize("spec", [CONVNEXT, VIT], ids=["convnext", "vit"])
def test_gradients_reach_every_parameter(spec: str) -> None:
    missing = [name for name, p in run(spec).named_parameters() if not p.grad.abs().sum() > 0]
    assert not missing


@pytest.mark.parametrize("spec", [RESNET, VIT, SWIN, INFLATED], ids=["resnet", "vit", "swin", "inflated"])
def test_saved_and_loaded_logits_are_equal(spec: str, tmp_path: Path) -> None:
    model = run(spec).eval()
    given = torch.rand(1, 1, *((32, 64, 1) if "inflate" not in spec else (16, 24, 16)))
    rows = torch.randn(2, 12)
    model.save_pretrained(tmp_path)
    again = MoME.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want = model(given, rows).logits
        assert torch.equal(model(given, rows).logits, want) and torch.equal(again(given, rows).logits, want)
    with torch.device("meta"):
        meta = MoME(model.config)
    assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))


def test_new_networks_start_as_timms_do() -> None:
    """Among other things, the last norm of a residual block starts at zero."""
    encoder = built(RESNET)
    assert not encoder.network.layer1[0].bn2.weight.any()
    assert encoder.network.layer1[0].bn1.weight.eq(1).all()
    weight = built(INFLATED).network.conv1[0].weight
    torch.testing.assert_close(weight[..., 0], weight[..., 2])
    assert weight.std() > 0.01


def test_weights_that_do_not_fit_are_refused_and_nothing_is_copied() -> None:
    encoder = built(RESNET)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    three = timm.create_model("test_resnet", features_only=True, out_indices=(0, 1, 2))
    with pytest.raises(InputError, match="1 of .* tensors do not fit: 'conv1.0.weight'") as caught:
        load_timm_weights(encoder, three)
    assert "timm.create_model('test_resnet', pretrained=True, features_only=True, in_chans=1)" in str(caught.value)
    with pytest.raises(InputError, match="tensors do not fit"):
        load_timm_weights(encoder, timm.create_model("test_convnext", features_only=True, in_chans=1))
    with pytest.raises(InputError, match="weights of timm fit a timm encoder, not UNet"):
        load_timm_weights(small().encoder, three)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("model='resnet19'", "timm has no model 'resnet19', did you mean 'resnet"),
        ("model='hf-hub:timm/resnet18.a1_in1k'", "timm has no model 'hf-hub:timm/resnet18.a1_in1k'"),
        ("model='local-dir:/tmp/x'", "timm has no model 'local-dir:/tmp/x'"),
        ("model=''", "timm has no model ''"),
        ("model='mixer_s16_224'", "'mixer_s16_224' takes no slices of 64 × 96"),
        ("model='resnet18', mode='slice'", "mode of timm is slices or inflate, got 'slice', did you mean 'slices'"),
        ("model='test_vit', mode='inflate'", "cannot be inflated to 3D: it has a layer of class VisionTransformer"),
        ("model='test_convnext', mode='inflate'", "cannot be inflated to 3D: it has a layer of class LayerNorm"),
        ("model='test_efficientnet', mode='inflate'", "cannot be inflated to 3D: it has a layer of class"),
        ("model='test_resnet', mode='inflate', neighbours=1", "neighbours of timm are for mode='slices'"),
        ("model='test_resnet', levels=[9]", "'test_resnet', levels=[9] gives no features"),
        ("model='test_resnet', levels=[0], stem=0", "the decoder needs two strides or more"),
        ("model='test_resnet', levels=[1, 1]", "levels of timm are different numbers from 0"),
        ("model='test_resnet', slice_axis=3", "slice_axis of timm is 0, 1 or 2, got 3"),
        ("model='test_resnet', neighbours=-1", "neighbours of timm is at least 0"),
        ("model='test_resnet', depth=0", "depth of timm is at least 1"),
    ],
)
def test_impossible_arguments_are_refused(arguments: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        ENCODERS.build(f"timm({arguments})", in_channels=1)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_a_network_without_features_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_features(
        *args: object, **kwargs: object
    ) -> nn.Module:  # timm 1.0.31 has no such network, older ones do
        raise RuntimeError("features_only not implemented for this architecture")

    monkeypatch.setattr(timm, "create_model", without_features)
    with pytest.raises(InputError, match="'test_vit2' gives no features: RuntimeError: features_only not implemented"):
        ENCODERS.build("timm(model='test_vit2')", in_channels=1)
