"""Published weights become checkpoints: the same maps and logits, a full account, and refusals in words.

The owner's classes with random weights stand for the published files, which are not at hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import monai.networks.nets as nets
import pytest
import torch
from monai.networks.nets.segresnet_ds import SegResEncoder
from owner_networks import owner_maps, randomise
from safetensors.torch import save_file
from torch import Tensor, nn
from universal_model import UniversalModel

from mome import MoME
from mome.cli.main import main
from mome.convert.run import convert
from mome.convert.source import without_prefixes
from mome.errors import InputError
from mome.labels import load_dataset
from mome.processing import MoMEProcessor

SWIN: dict[str, Any] = {"feature_size": 12, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 3}
SWIN_SIDES = (64, 32, 32)
SWIN_MAPS = ["decoder5", "decoder4", "decoder3", "decoder2", "decoder1", "encoder10"]


def swin(version_2: bool = False) -> nn.Module:
    return randomise(nets.SwinUNETR(in_channels=1, out_channels=3, use_v2=version_2, **SWIN))


def ds(**changed: Any) -> nn.Module:
    arguments = {"init_filters": 4, "blocks_down": (1, 2, 1), "dsdepth": 2, **changed}
    return randomise(nets.SegResNetDS(**arguments))


def store(tensors: Mapping[str, Tensor], path: Path) -> Path:
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)
    return path


def maps_of(folder: Path, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        pyramid = MoME.from_pretrained(folder).eval().encoder(x)
    return [*pyramid.maps, pyramid.bottleneck]


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert one.shape == other.shape and (one - other).abs().max() < 1e-5


def volume(*sides: int) -> Tensor:
    return torch.rand(1, 1, *sides, generator=torch.Generator().manual_seed(0))


def test_ct_fm(tmp_path: Path) -> None:
    owner = ds()
    report = convert("ct-fm", store(owner.state_dict(), tmp_path / "model.safetensors"), tmp_path / "out")
    x = volume(16, 8, 8)
    names = ["up_layers.0.blocks", "up_layers.1.blocks", "encoder.layers.2.blocks"]
    assert_same(maps_of(tmp_path / "out", x), owner_maps(owner, names, x))
    assert sorted(report.unused) == [f"up_layers.{i}.head.{kind}" for i in (0, 1) for kind in ("bias", "weight")]
    processor = MoMEProcessor.from_pretrained(tmp_path / "out")
    assert processor.orientation == "SPL" and list(processor.spacing) == [3, 1, 1]
    assert list(processor.hu_window) == [-1024, 2048]
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["matched"] == list(report.matched)


def test_the_report_accounts_for_every_tensor(tmp_path: Path) -> None:
    source = store(ds().state_dict(), tmp_path / "model.safetensors")
    report = convert("ct-fm", source, tmp_path / "out", parts={"experts": "mlp(n=2, hidden=8)"})
    model = MoME.from_pretrained(tmp_path / "out")
    assert model.config.part_strings()["experts"] == "mlp(n=2, hidden=8)" and model.config.trained_labels == []
    named = {name for name in model.state_dict() if not name.startswith("text_bank.")}
    assert set(report.matched) | set(report.random) == named and not set(report.matched) & set(report.random)
    assert {name.split(".")[0] for name in report.random} == {"scale_experts", "fusion", "head"}
    assert any("untrained" in note for note in report.notes)
    again = convert("ct-fm", source, tmp_path / "again", parts={"experts": "mlp(n=2, hidden=8)"})
    assert again.matched == report.matched
    first, second = model.state_dict(), MoME.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ct_fms_encoder_alone_leaves_the_decoder_random(tmp_path: Path) -> None:
    owner = randomise(SegResEncoder(init_filters=4, blocks_down=(1, 2, 1)))
    report = convert("ct-fm", store(owner.state_dict(), tmp_path / "a.safetensors"), tmp_path / "out")
    x = volume(16, 8, 8)
    assert_same(maps_of(tmp_path / "out", x)[-1:], owner_maps(owner, ["layers.2.blocks"], x))
    assert report.unused == ()
    assert {name.split(".")[2] for name in report.random if name.startswith("encoder.")} == {"up_layers"}


@pytest.mark.parametrize("kind", ["original", "group", "anisotropic"])
def test_segresnet(kind: str, tmp_path: Path) -> None:
    if kind == "anisotropic":
        owner = ds(resolution=(4.0, 1.0, 1.0), norm="instance", blocks_up=(2, 1))
        names, norm = ["up_layers.0.blocks", "up_layers.1.blocks", "encoder.layers.2.blocks"], None
    else:
        owner = randomise(nets.SegResNet(init_filters=8, blocks_down=(1, 2, 1), blocks_up=(1, 2), norm=NORMS[kind]))
        names, norm = ["up_layers.0", "up_layers.1", "down_layers.2"], "instance" if kind == "original" else None
    report = convert("segresnet", store(owner.state_dict(), tmp_path / "a.safetensors"), tmp_path / "out", norm=norm)
    x = volume(16, 8, 8)
    assert_same(maps_of(tmp_path / "out", x), owner_maps(owner, names, x))
    assert any("(--norm)" in note for note in report.notes) == (norm is None)


NORMS = {"original": ("instance", {"affine": True}), "group": ("group", {"num_groups": 8})}


@pytest.mark.parametrize("version_2", [False, pytest.param(True, marks=pytest.mark.wide)], ids=["v1", "v2"])
def test_swin_unetr(version_2: bool, tmp_path: Path) -> None:
    owner = swin(version_2)
    report = convert("swin-unetr", store(owner.state_dict(), tmp_path / "a.safetensors"), tmp_path / "out")
    x = volume(*SWIN_SIDES)
    assert_same(maps_of(tmp_path / "out", x), owner_maps(owner, SWIN_MAPS, x))
    assert sorted(report.unused) == ["out.conv.conv.bias", "out.conv.conv.weight"]


def test_the_self_supervised_encoder_of_monai(tmp_path: Path) -> None:
    """`SwinUNETR.load_from` expects these names: no name before the transformer's keys, and fc1, fc2."""
    owner = swin()
    tensors = {
        "module." + key.removeprefix("swinViT.").replace("mlp.linear", "mlp.fc"): tensor
        for key, tensor in owner.state_dict().items()
        if key.startswith("swinViT.")
    }
    torch.save({"epoch": 3, "state_dict": tensors, "optimizer": {}}, tmp_path / "model_swinvit.pt")
    report = convert("swin-unetr", tmp_path / "model_swinvit.pt", tmp_path / "out")
    assert report.unused == () and len(report.matched) == len(tensors)
    mine = MoME.from_pretrained(tmp_path / "out").encoder.network.swinViT.state_dict()
    assert all(torch.equal(mine[key], tensor) for key, tensor in owner.swinViT.state_dict().items())


def test_voco(tmp_path: Path) -> None:
    """The self-supervised files hold the transformer, the encoder's convolutions and a projection head."""
    owner = swin(version_2=True)
    kept = ("swinViT.", "encoder")
    tensors = {f"module.backbone.{k}": v for k, v in owner.state_dict().items() if k.startswith(kept)}
    tensors["module.proj_head.0.weight"] = torch.zeros(4, 4)
    torch.save({"student": tensors, "epoch": 1}, tmp_path / "VoCo.pt")
    report = convert("voco", tmp_path / "VoCo.pt", tmp_path / "out")
    x = volume(*SWIN_SIDES)
    assert_same(maps_of(tmp_path / "out", x)[-1:], owner_maps(owner, ["encoder10"], x))
    assert report.unused == ("proj_head.0.weight",)
    assert {n.split(".")[2] for n in report.random if n.startswith("encoder.")} == {f"decoder{i}" for i in range(1, 6)}


def ancestor(backbone: str, width: int, **swin_arguments: Any) -> UniversalModel:
    torch.manual_seed(0)
    model = UniversalModel(backbone, width, **swin_arguments)
    for module in (model.precls_conv, model.GAP, model.controller, model.text_to_vision):
        randomise(module)
    return randomise(model).eval()  # type: ignore[return-value]


def check_ancestor(model: UniversalModel, tmp_path: Path, sides: tuple[int, int, int]) -> Any:
    names = {
        key.removeprefix("backbone.") if index % 2 else f"module.{key}": tensor
        for index, (key, tensor) in enumerate(model.state_dict().items())
    }
    torch.save({"net": names, "optimizer": {"lr": 1.0}, "epoch": 7}, tmp_path / "universal.pth")
    report = convert("universal-model", tmp_path / "universal.pth", tmp_path / "out")
    mine = MoME.from_pretrained(tmp_path / "out").eval()
    labels = list(load_dataset("ancestor_32").name_to_id)
    x = volume(*sides)
    with torch.no_grad():
        wanted = model(x)
        logits = mine(x, mine.text_bank.rows(labels)).logits
    assert logits.shape == wanted.shape and wanted.std() > 1e-2
    assert (logits - wanted).abs().max() < 1e-4
    assert report.random == () and mine.config.trained_labels == labels
    return report


def test_universal_model_with_its_u_net(tmp_path: Path) -> None:
    report = check_ancestor(ancestor("unet", 8), tmp_path, (16, 16, 16))
    endings = {name.rsplit(".", 1)[-1] for name in report.unused}
    assert endings == {"running_mean", "running_var", "num_batches_tracked", "bias"}
    assert all(".conv1.bias" in name or ".bn1." in name for name in report.unused)


def test_batch_statistics_of_the_u_net_are_those_of_each_volume(tmp_path: Path) -> None:
    """The published network mixes the statistics of a batch; ours gives each volume what it gets alone."""
    check_ancestor(ancestor("unet", 8), tmp_path, (16, 16, 16))
    model = MoME.from_pretrained(tmp_path / "out").eval()
    x = torch.rand(2, 1, 16, 16, 16)
    with torch.no_grad():
        both, one = model.encoder(x).maps[-1], model.encoder(x[:1]).maps[-1]
    torch.testing.assert_close(both[:1], one)


@pytest.mark.wide
def test_universal_model_with_swin_unetr(tmp_path: Path) -> None:
    model = ancestor("swinunetr", 48, depths=(1, 1, 1, 1), window_size=3)
    report = check_ancestor(model, tmp_path, SWIN_SIDES)
    assert report.unused == ()


def test_prefixes_of_wrappers_go_and_keys_never_merge() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    assert set(without_prefixes({"module.backbone.a": one, "module.b": two})) == {"a", "b"}
    assert set(without_prefixes({"module.a": one, "a": two})) == {"module.a", "a"}


# -- refusals -----------------------------------------------------------------------------------------------


def refused(family: str, source: Path, tmp_path: Path, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        convert(family, source, tmp_path / "refused", **more)
    assert not (tmp_path / "refused").exists() and len(str(caught.value).split("\n")) <= 3
    return str(caught.value)


def test_a_file_of_another_architecture_is_refused_with_part_key_and_shape(tmp_path: Path) -> None:
    file = store(ds().state_dict(), tmp_path / "ds.safetensors")
    for family in ("voco", "swin-unetr"):
        message = refused(family, file, tmp_path)
        assert "its part 'swinViT' lacks swinViT.patch_embed.proj.weight" in message
        assert "encoder.conv_init.weight' of shape (4, 1, 3, 3, 3)" in message
    assert "lacks swinViT.patch_embed.proj.weight" in refused("universal-model", file, tmp_path)
    vnet = store(nets.BasicUNet(3, 1, 2, features=(4, 4, 4, 4, 4, 4)).state_dict(), tmp_path / "unet.safetensors")
    assert "its part 'encoder' lacks encoder.conv_init.weight" in refused("ct-fm", vnet, tmp_path)
    assert "its part 'encoder' lacks encoder.conv_init.weight" in refused("segresnet", vnet, tmp_path)


def test_a_file_that_lacks_one_tensor_is_refused(tmp_path: Path) -> None:
    tensors = dict(ds().state_dict())
    del tensors["up_layers.1.blocks.0.conv2.weight"]
    message = refused("ct-fm", store(tensors, tmp_path / "a.safetensors"), tmp_path)
    assert "its part 'up_layers' lacks up_layers.1.blocks.0.conv2.weight of shape (4, 4, 3, 3, 3)" in message
    tensors = dict(ds().state_dict())
    tensors["encoder.layers.0.downsample.weight"] = torch.zeros(9, 4, 3, 3, 3)
    message = refused("ct-fm", store(tensors, tmp_path / "b.safetensors"), tmp_path)
    assert "encoder.layers.0.downsample.weight has shape (9, 4, 3, 3, 3), not (8, 4, 3, 3, 3)" in message
    tensors["encoder.layers.0.downsample.weight"] = torch.full((8, 4, 3, 3, 3), float("nan"))
    assert "not finite" in refused("ct-fm", store(tensors, tmp_path / "c.safetensors"), tmp_path)


def test_integers_in_the_place_of_weights_and_the_reverse_are_refused(tmp_path: Path) -> None:
    owner = ds(norm="batch").state_dict()
    quantised = {key: (127 * tensor).round().to(torch.int8) for key, tensor in owner.items()}
    message = refused("segresnet", store(quantised, tmp_path / "a.safetensors"), tmp_path)
    assert "holds numbers of torch.int8 in encoder.network.encoder.conv_init.weight" in message
    # The largest index of windows of 5 tokens is 728, and bfloat16 holds every integer up to 256 only.
    owner = nets.SwinUNETR(in_channels=1, out_channels=3, **{**SWIN, "window_size": 5}).state_dict()
    rounded = {key: tensor.bfloat16() for key, tensor in owner.items()}
    message = refused("swin-unetr", store(rounded, tmp_path / "b.safetensors"), tmp_path)
    assert "torch.bfloat16 in encoder.network.swinViT.layers1.0.blocks.0.attn.relative_position_index" in message
    half = {key: tensor.half() for key, tensor in ds(norm="batch").state_dict().items()}  # counts of batches, too
    convert("segresnet", store(half, tmp_path / "c.safetensors"), tmp_path / "out")


def test_several_channels_are_refused(tmp_path: Path) -> None:
    file = store(nets.SegResNetDS(init_filters=4, in_channels=4).state_dict(), tmp_path / "a.safetensors")
    assert "volumes of 4 channels" in refused("segresnet", file, tmp_path)


def test_the_universal_model_without_text_is_refused(tmp_path: Path) -> None:
    tensors = {k: v for k, v in UniversalModel("unet", 8).state_dict().items() if "text_to_vision" not in k}
    message = refused("universal-model", store(tensors, tmp_path / "a.safetensors"), tmp_path)
    assert "lacks text_to_vision.weight" in message
    whole = store(UniversalModel("unet", 8).state_dict(), tmp_path / "b.safetensors")
    assert "whole model" in refused("universal-model", whole, tmp_path, parts={"experts": "mlp"})


class Hostile:
    """An object whose unpickling would run a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_files_that_would_execute_code_or_are_damaged_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "run": Hostile(tmp_path / "ran")}, tmp_path / "a.pt")
    assert "would execute code" in refused("voco", tmp_path / "a.pt", tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.save({"epoch": 1, "names": ["a"]}, tmp_path / "b.pt")
    assert "no named tensors" in refused("voco", tmp_path / "b.pt", tmp_path)
    (tmp_path / "c.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:200])
    assert "damaged" in refused("voco", tmp_path / "c.pt", tmp_path)
    (tmp_path / "d.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    assert "damaged" in refused("voco", tmp_path / "d.safetensors", tmp_path)
    assert "no such file" in refused("voco", tmp_path / "missing.pt", tmp_path)
    (tmp_path / "text.pt").write_text("# not weights")
    assert "no file of torch.save: its first bytes are those of another format" in refused(
        "voco", tmp_path / "text.pt", tmp_path
    )
    (tmp_path / "empty.safetensors").write_bytes(b"")
    assert "damaged" in refused("voco", tmp_path / "empty.safetensors", tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = store(ds().state_dict(), tmp_path / "model.safetensors"), tmp_path / "out"
    command = ["convert", "ct-fm", str(file), str(out), "--spacing", "2", "2", "2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert (
        "matched" in printed
        and "random" in printed
        and "not used" in printed
        and f"written to {out}; next: mome train --config run.yaml init={out}" in printed
    )
    assert list(MoMEProcessor.from_pretrained(out).spacing) == [2, 2, 2]
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert main([*command, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "ct-fm"
    assert main(["convert", "ct-fm", str(out), str(out), "--overwrite"]) == 2
    assert "holds the source" in capsys.readouterr().err
    for wrong, said in {
        ("ctfm",): "did you mean 'ct-fm'",
        ("ct-fm", "expert=mlp"): "did you mean 'experts'",
        ("ct-fm", "mlp"): "is no part",
        ("voco", "--norm", "group"): "--norm is for segresnet",
        ("ct-fm", "--orientation", "RAX"): "orientation",
        ("ct-fm", "experts=mlp(n=0)"): "at least 1",
    }.items():
        family, *more = wrong
        assert main(["convert", family, str(file), str(tmp_path / "new"), *more]) == 2, wrong
        assert said in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
