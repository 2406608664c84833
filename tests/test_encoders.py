"""Encoders with the owner's weights give the owner's maps, on sides of any length, along axes of any stride."""

from __future__ import annotations

import ast
import copy
import importlib.util
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.networks.nets as nets
import pytest
import torch
from owner_networks import owner_maps, randomise
from safetensors.torch import load_file, save_file
from torch import nn

from mome import MoME, MoMEConfig
from mome.encoders.monai_networks import NETWORKS
from mome.errors import InputError
from mome.registry import ENCODERS

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("dynamic_network_architectures") is None,
    reason="dynamic_network_architectures is not installed",
)
SWIN = {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 3}
DYN = {
    "kernel_size": [[1, 3, 3], 3, 3],
    "strides": [1, [1, 2, 2], 2],
    "upsample_kernel_size": [[1, 2, 2], 2],
    "filters": [4, 8, 8],
}
UNETR = {"img_size": [32, 32, 48], "feature_size": 4, "hidden_size": 24, "mlp_dim": 16, "num_heads": 2}


def _resenc(**changed: Any) -> nn.Module:
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    arguments = {
        "input_channels": 1, "n_stages": 3, "features_per_stage": [4, 8, 8], "conv_op": nn.Conv3d,
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "n_blocks_per_stage": [1, 2, 1], "num_classes": 3, "n_conv_per_stage_decoder": [1, 1], "conv_bias": True,
        "norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True}, "deep_supervision": False,
    }  # fmt: skip
    return ResidualEncoderUNet(**{**arguments, **changed})


def _swin_heads(version_2: bool) -> Callable[[], nn.Module]:
    return lambda: nets.SwinUNETR(in_channels=1, out_channels=2, use_v2=version_2, **SWIN)


# Name → the spec, the owner's network, the modules whose outputs are the decoder maps and the bottleneck, and sides.
CASES: dict[str, tuple[str | dict[str, Any], Callable[[], nn.Module], list[str], tuple[int, int, int]]] = {
    "swin_unetr": (
        {"name": "swin_unetr", **SWIN},
        _swin_heads(False),
        ["decoder5", "decoder4", "decoder3", "decoder2", "decoder1", "encoder10"],
        (64, 32, 32),
    ),
    "swin_unetr_v2": (
        {"name": "swin_unetr", "use_v2": True, **SWIN},
        _swin_heads(True),
        ["decoder5", "decoder4", "decoder3", "decoder2", "decoder1", "encoder10"],
        (64, 32, 32),
    ),
    "segresnet": (
        "segresnet(filters=4, blocks_down=[1, 2, 1], blocks_up=[2, 1])",
        lambda: nets.SegResNetDS(init_filters=4, blocks_down=(1, 2, 1), blocks_up=(2, 1), dsdepth=2),
        ["up_layers.0.blocks", "up_layers.1.blocks", "encoder.layers.2.blocks"],
        (16, 8, 16),
    ),
    "segresnet_anisotropic": (
        "segresnet(filters=4, blocks_down=[1, 1, 1], norm='instance', resolution=[3, 1, 1])",
        lambda: nets.SegResNetDS(init_filters=4, blocks_down=(1, 1, 1), norm="instance", resolution=(3.0, 1.0, 1.0)),
        ["up_layers.0.blocks", "up_layers.1.blocks", "encoder.layers.2.blocks"],
        (8, 16, 16),
    ),
    "segresnet_original": (
        "segresnet(layout='original', filters=8, blocks_down=[1, 2, 1], norm='group')",
        lambda: nets.SegResNet(init_filters=8, blocks_down=(1, 2, 1), blocks_up=(1, 1), out_channels=3),
        ["up_layers.0", "up_layers.1", "down_layers.2"],
        (16, 8, 16),
    ),
    "mednext": (
        "mednext(size='B', filters=4)",
        lambda: _mednext("B"),
        ["dec_stages.0", "dec_stages.1", "dec_stages.2", "dec_stages.3", "bottleneck"],
        (32, 16, 16),
    ),
    "resenc_unet": (
        "resenc_unet(features=[4, 8, 8], blocks=[1, 2, 1], strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]], "
        "kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3]])",
        _resenc,
        ["decoder.stages.0", "decoder.stages.1", "encoder.stages.2"],
        (8, 16, 16),
    ),
    "monai_basic_unet": (
        'monai(network="BasicUNet", arguments={"features": [4, 4, 4, 8, 8, 6]})',
        lambda: nets.BasicUNet(3, 1, 2, features=(4, 4, 4, 8, 8, 6)),
        ["upcat_4", "upcat_3", "upcat_2", "upcat_1", "down_4"],
        (32, 16, 16),
    ),
    "monai_dynunet": (
        {"name": "monai", "network": "DynUNet", "arguments": DYN},
        lambda: nets.DynUNet(3, 1, 2, **DYN),
        ["upsamples.0", "upsamples.1", "bottleneck"],
        (8, 16, 16),
    ),
    "monai_unet": (
        'monai(network="UNet", arguments={"channels": [4, 6, 8], "strides": [2, [1, 2, 2]], "num_res_units": 1})',
        lambda: nets.UNet(3, 1, 4, channels=(4, 6, 8), strides=(2, (1, 2, 2)), num_res_units=1),
        ["model.1.submodule.2", "model.2", "model.1.submodule.1.submodule"],
        (8, 16, 16),
    ),
    "monai_attention_unet": (
        'monai(network="AttentionUnet", arguments={"channels": [4, 6, 8], "strides": [2, 2]})',
        lambda: nets.AttentionUnet(3, 1, 2, channels=(4, 6, 8), strides=(2, 2)),
        ["model.1.submodule.1.merge", "model.1.merge", "model.1.submodule.1.submodule"],
        (16, 8, 16),
    ),
    "monai_unetr": (
        {"name": "monai", "network": "UNETR", "arguments": UNETR},
        lambda: nets.UNETR(in_channels=1, out_channels=2, **UNETR),
        ["decoder5", "decoder4", "decoder3", "decoder2", "decoder5<"],
        (32, 32, 48),
    ),
    "monai_vnet": (
        'monai(network="VNet")',
        lambda: nets.VNet(3, 1, 2),
        ["up_tr256", "up_tr128", "up_tr64", "up_tr32", "down_tr256"],
        (32, 16, 16),
    ),
}
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_package if name == "resenc_unet" else ()) for name in CASES]
)


def _mednext(size: str) -> nn.Module:
    """The owner's class with the owner's numbers, at four filters: `create_mednext` builds 32 only."""
    big = nets.mednext.create_mednext(size, kernel_size=3)
    ratios = [int(stage[0].conv2.out_channels / stage[0].conv2.in_channels) for stage in big.enc_stages]
    up_ratios = [int(stage[0].conv2.out_channels / stage[0].conv2.in_channels) for stage in big.dec_stages]
    return nets.mednext.MedNeXt(
        init_filters=4,
        encoder_expansion_ratio=ratios,
        decoder_expansion_ratio=up_ratios,
        bottleneck_expansion_ratio=int(big.bottleneck[0].conv2.out_channels / big.bottleneck[0].conv2.in_channels),
        kernel_size=3,
        use_residual_connection=True,
        blocks_down=[len(stage) for stage in big.enc_stages],
        blocks_bottleneck=len(big.bottleneck),
        blocks_up=[len(stage) for stage in big.dec_stages],
    )


def loaded(spec: Any, owner: nn.Module) -> nn.Module:
    """Our encoder with the owner's tensors; every one of ours must be among them."""
    encoder = ENCODERS.build(spec).eval()
    given = owner.state_dict()
    mine = encoder.network.state_dict()
    assert set(mine) <= set(given), sorted(set(mine) - set(given))[:3]
    encoder.network.load_state_dict({name: given[name] for name in mine})
    return encoder


@every_case
def test_maps_are_the_owners(name: str) -> None:
    spec, build, modules, sides = CASES[name]
    owner = randomise(build())
    x = torch.rand(2, 1, *sides, generator=torch.Generator().manual_seed(0))
    encoder = loaded(spec, owner)
    with torch.no_grad():
        pyramid = encoder(x)
    wanted = owner_maps(owner, modules, x)
    assert len(pyramid.maps) == len(wanted) - 1
    for mine, theirs in zip((*pyramid.maps, pyramid.bottleneck), wanted, strict=True):
        assert mine.shape == theirs.shape and theirs.abs().max() > 1e-3
        assert (mine - theirs).abs().max() < 1e-5
    for map_BCDHW, channels, stride in zip(pyramid.maps, encoder.channels, encoder.strides, strict=True):
        assert map_BCDHW.shape[1] == channels
        assert tuple(map_BCDHW.shape[2:]) == tuple(side // step for side, step in zip(sides, stride, strict=True))
    assert pyramid.bottleneck.shape[1] == encoder.bottleneck_channels


@every_case
def test_odd_sides_are_padded_inside_and_cropped(name: str) -> None:
    spec, _, _, sides = CASES[name]
    torch.manual_seed(0)
    encoder = ENCODERS.build(spec).eval()
    odd = (sides[0] - 1, sides[1] - 3, sides[2])
    x = torch.rand(1, 1, *odd)
    padded = torch.zeros(1, 1, *sides)
    padded[:, :, : odd[0], : odd[1]] = x
    with torch.no_grad():
        got, whole = encoder(x), encoder(padded)
    for mine, theirs, stride in zip(got.maps, whole.maps, encoder.strides, strict=True):
        d, h, w = (-(-side // step) for side, step in zip(odd, stride, strict=True))
        assert torch.equal(mine, theirs[:, :, :d, :h, :w])


@pytest.mark.parametrize(
    "name", ["segresnet_anisotropic", "monai_dynunet", pytest.param("mednext", marks=pytest.mark.wide)]
)
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    spec, _, _, sides = CASES[name]
    torch.manual_seed(0)
    config = MoMEConfig(
        encoder=spec, text_encoder="bank(width=4)", labels=["liver"], dim=4, head_channels=4, patch_size=list(sides)
    )
    model = MoME(config).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    x, text = torch.rand(1, 1, *sides), torch.randn(1, 4)
    for each in (model, checkpointed):
        each(x, text).logits.square().mean().backward()
    for (key, one), two in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-7, msg=key)


@pytest.mark.parametrize("size", ["S", "B", *(pytest.param(size, marks=pytest.mark.wide) for size in "ML")])
def test_sizes_of_mednext_are_the_owners(size: str) -> None:
    with torch.device("meta"):
        owner = nets.mednext.create_mednext(size, kernel_size=3).state_dict()
        mine = ENCODERS.build(f"mednext(size='{size}')").network.state_dict()
    assert {key: tensor.shape for key, tensor in owner.items() if not key.startswith("out_0")} == {
        key: tensor.shape for key, tensor in mine.items()
    }


MONAI = [name for name in CASES if name.startswith("monai_")]


@pytest.mark.parametrize("name", MONAI)
def test_gradients_reach_every_parameter_of_monais_networks(name: str) -> None:
    spec, _, _, sides = CASES[name]
    torch.manual_seed(0)
    encoder = ENCODERS.build(spec).train()
    pyramid = encoder(torch.rand(2, 1, *sides))
    sum(map_BCDHW.square().mean() for map_BCDHW in (*pyramid.maps, pyramid.bottleneck)).backward()
    missing = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


@pytest.mark.parametrize("name", ["monai_unetr", "monai_attention_unet", "monai_dynunet"])
def test_what_a_checkpoint_lacks_of_monais_networks_is_filled(name: str, tmp_path: Path) -> None:
    spec, _, _, sides = CASES[name]
    config = MoMEConfig(encoder=spec, text_encoder="bank(width=4)", labels=["liver"], dim=4, patch_size=list(sides))
    MoME(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith("encoder.")}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = MoME.from_pretrained(tmp_path, allow_missing=True)
    for key, parameter in loaded.encoder.named_parameters():
        assert torch.isfinite(parameter).all() and parameter.abs().max() < 5, key
    for module in loaded.encoder.modules():
        if isinstance(module, nn.PReLU):
            assert torch.equal(module.weight, torch.full_like(module.weight, 0.25))
    if name == "monai_unetr":
        embeddings = loaded.encoder.network.vit.patch_embedding.position_embeddings
        assert 0.01 < embeddings.std() < 0.04


def test_ct_fm_has_its_published_size() -> None:
    """87.2 M parameters, the layout of `ct_fm_segresnet`: 32 filters, blocks 1-2-2-4-4."""
    with torch.device("meta"):
        encoder = ENCODERS.build("segresnet")
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == 87.2
    assert encoder.channels == (256, 128, 64, 32) and encoder.size_divisor == (16, 16, 16)


@needs_package
def test_resenc_presets_have_nnunets_size() -> None:
    """nnU-Net's six stages have 102.35 M parameters, of which the encoder has 90.3 M, with one output class."""
    with torch.device("meta"):
        encoder = ENCODERS.build("resenc_unet")
        small = ENCODERS.build("resenc_unet(preset='S')")
    assert round(sum(p.numel() for p in encoder.network.encoder.parameters()) / 1e6, 1) == 90.3
    assert abs(sum(p.numel() for p in encoder.parameters()) / 1e6 - 102.35) < 0.05
    assert (len(encoder.channels), len(small.channels)) == (5, 4)


@needs_package
def test_new_residual_blocks_start_as_nnunets() -> None:
    """`ResidualEncoderUNet.initialize` of the package leaves the same tensors constant, at the same values."""
    spec = "resenc_unet(features=[4, 8, 8], blocks=[1, 2, 1], kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3]])"
    config = MoMEConfig(encoder=spec, text_encoder="bank(width=4)", labels=["liver"], patch_size=[16, 16, 16])
    own = MoME(config).encoder.network.state_dict()
    theirs = _resenc()
    theirs.apply(theirs.initialize)
    want = theirs.state_dict()
    names = [name for name in own if want[name].unique().numel() == 1]
    assert sum(name.endswith("conv2.all_modules.1.weight") for name in names) == 4
    for name in names:
        torch.testing.assert_close(own[name], want[name], msg=name)


def test_the_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "dynamic_network_architectures.architectures.unet", None)
    with pytest.raises(InputError, match="needs the package dynamic-network-architectures") as caught:
        ENCODERS.build("resenc_unet")
    assert "pip install --no-deps dynamic-network-architectures" in str(caught.value)


REFUSED = {
    "segresnet(layout='ds')": "layout of segresnet is",
    "segresnet(norm='batsh')": "did you mean 'batch'",
    "segresnet(blocks_down=[1])": "at least two stages",
    "segresnet(blocks_up=[1])": "one entry less than blocks_down",
    "segresnet(filters=12, norm='group')": "divides the filters by 8",
    "segresnet(layout='original', resolution=[1, 1, 1])": "only in the layout",
    "segresnet(resolution=[1, 0, 1])": "three positive numbers",
    "segresnet(filters=0)": "filters of segresnet is at least 1",
    "mednext(size='XL')": "size of mednext is",
    "mednext(kernel_size=4)": "kernel_size of mednext is odd",
    "mednext(filters=0)": "filters of mednext is at least 1",
    "resenc_unet(preset='XXL')": "preset of resenc_unet is",
    "resenc_unet(features=[4])": "at least two stages",
    "resenc_unet(features=[4, 8], blocks=[1, 1, 1])": "features 2, blocks 3",
    "resenc_unet(features=[4, 8], strides=[[1, 1, 1], [3, 2, 2]])": "strides of resenc_unet are 1 or 2",
    "resenc_unet(features=[4, 8], strides=[[1, 1, 1], [1, 1, 1]])": "downsampled along some axis",
    "resenc_unet(features=[4, 8], strides=[[1, 1], [2, 2]])": "triples",
    "resenc_unet(features=[4, 8], kernels=[[3, 3, 3], [2, 3, 3]])": "kernels of resenc_unet are odd",
    "genesis_unet(width=0)": "width of genesis_unet is at least 1",
    "monai(network='BasicUnet')": "did you mean 'BasicUNet'",
    "monai(network='HighResNet')": "networks: AttentionUnet, BasicUNet, DynUNet, UNet, UNETR, VNet",
    "monai(network='SegResNet')": "has a part of its own",
    "monai(network='UNETR')": "missing a required argument: 'img_size'",
    "monai(network='DynUNet')": "arguments={'kernel_size': [3, 3, 3], 'strides': [1, 2, 2]",
    "monai(network='UNet')": "arguments={'channels': [16, 32, 64], 'strides': [2, 2]}",
    "monai(network='AttentionUnet')": "arguments={'channels': [16, 32, 64], 'strides': [2, 2]}",
    "monai(network='UNETR', arguments={'img_size': [33, 32, 32]})": "three multiples of 16",
    "monai(network='UNet', arguments={'channels': [4, 8], 'stride': [2]})": "did you mean 'strides'",
    "monai(network='UNet', arguments={'channels': [4, 8, 8], 'strides': [2, 2, 2]})": "strides one less",
    "monai(network='UNet', arguments={'channels': [4, 8], 'strides': [2], 'kernel_size': 2})": "Same padding not",
    "monai(network='UNet', arguments={'channels': [4, -8], 'strides': [2]})": "UNet cannot be built",
    "monai(arguments={'act': 'reelu'})": "REELU",
    "monai(arguments={'in_channels': 2})": "follows from the model",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_impossible_arguments_are_refused_when_built(spec: str) -> None:
    with pytest.raises(InputError) as caught:
        ENCODERS.build(spec)
    assert REFUSED[spec] in str(caught.value)
    assert len(str(caught.value).split("\n")) <= 3


@pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if network.example])
def test_the_example_of_a_missing_argument_builds(name: str) -> None:
    with torch.device("meta"):
        ENCODERS.build({"name": "monai", "network": name, "arguments": ast.literal_eval(NETWORKS[name].example or "")})


def test_a_patch_larger_than_the_network_was_built_for_is_refused() -> None:
    spec = {"name": "monai", "network": "UNETR", "arguments": UNETR}
    with pytest.raises(InputError, match="larger than encoder 'monai' was built for, \\[32, 32, 48\\]"):
        MoME(MoMEConfig(encoder=spec, text_encoder="bank(width=4)", labels=["liver"], patch_size=[48, 32, 48]))
    encoder = ENCODERS.build(spec)
    with pytest.raises(InputError, match="at most \\[32, 32, 48\\]"):
        encoder(torch.zeros(1, 1, 64, 32, 48))


def test_an_encoder_that_joins_maps_stays_on_one_device() -> None:
    """The compact U-Net may be split between its stages, which are units of their own."""
    classes = {ENCODERS.part_class(name).__name__ for name in ENCODERS.names()} - {"UNet"}
    assert classes <= set(MoME._no_split_modules)


def test_the_decoder_frees_a_stage_once_it_is_joined_with_the_upsampled_map() -> None:
    encoder = MoME(MoMEConfig(encoder="unet(channels=[4, 8, 8])", labels=["liver"])).encoder
    freed: list[bool] = []

    def finest_stage_is_freed(*_: object) -> None:
        freed.append(finest() is None)

    with torch.inference_mode():
        stages = [torch.ones(1, 4, 8, 8, 8), torch.ones(1, 8, 4, 4, 4), torch.ones(1, 8, 2, 2, 2)]
        finest = weakref.ref(stages[0])
        encoder.decoder.fuse[-1].register_forward_pre_hook(finest_stage_is_freed)
        encoder.decoder(stages)
    assert freed == [True]
    one_too_many = [torch.ones(1, width, side, side, side) for width, side in ((2, 16), (4, 8), (8, 4), (8, 2))]
    with torch.inference_mode(), pytest.raises(ValueError, match="zip"):
        encoder.decoder(one_too_many)
