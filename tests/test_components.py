"""For every registered part: what Hugging Face's loading demands of a module, on one small model each."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mome.configuration import MoMEConfig
from mome.modeling import MoME
from mome.registry import ENCODERS, EXPERTS, FUSIONS, HEADS, ROUTERS

TINY_UNET = "unet(channels=[8, 8, 16])"
# Arguments that make a part small, or legal on a small model; a part that is not named here runs as it is.
SMALL = {
    "encoder": {
        "unet": TINY_UNET,
        "swin_unetr": "swin_unetr(feature_size=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2)",
        "segresnet": "segresnet(filters=4, blocks_down=[1, 1, 1])",
        "mednext": "mednext(filters=2)",
        "resenc_unet": "resenc_unet(features=[4, 8, 8], blocks=[1, 1, 1])",
        "genesis_unet": "genesis_unet(width=4)",
        "monai": 'monai(network="UNet", arguments={"channels": [4, 8, 8], "strides": [2, 2]})',
        "timm": "timm(model='test_convnext', levels=[0, 1, 2], stem=4)",
        "vit3d": "vit3d(width=12, depth=2, heads=1, patch=[4, 4, 4], decoder_channels=4)",
    },
    "experts": {
        "swiglu": "swiglu(n=4, hidden=8)",
        "mlp": "mlp(n=3, hidden=8)",
        "geglu": "geglu(n=2, hidden=8)",
    },
    "head": {"dynamic": "dynamic(hidden=16)"},
}
# Parts whose package is not installed with mome; without it their tests are skipped.
PACKAGES = {"resenc_unet": "dynamic_network_architectures"}
BASE = {
    "encoder": TINY_UNET,
    "text_encoder": "bank(width=12)",
    "experts": "swiglu(n=4, hidden=8)",
    "router": "topk(k=2)",
    "fusion": "text_guided(dim=8)",
    "head": "dynamic(hidden=16)",
    "labels": ["liver", "spleen", "aorta"],
    "text_dim": 12,
    "dim": 8,
    "patch_size": [16, 16, 16],
}


def _cases() -> list[Any]:
    registries = {
        "encoder": ENCODERS,
        "experts": EXPERTS,
        "router": ROUTERS,
        "fusion": FUSIONS,
        "head": HEADS,
    }
    return [
        pytest.param(part, SMALL.get(part, {}).get(name, name), id=f"{part}-{name}", marks=_marks(name))
        for part, registry in registries.items()
        for name in registry.names()
    ]


def _marks(name: str) -> list[pytest.MarkDecorator]:
    package = PACKAGES.get(name)
    if package is None or importlib.util.find_spec(package) is not None:
        return []
    return [pytest.mark.skip(reason=f"{package} is not installed")]


ALL_PARTS = _cases()
every_part = pytest.mark.parametrize(("part", "spec"), ALL_PARTS)


def make_config(part: str, spec: str) -> MoMEConfig:
    values = {**BASE, part: spec}
    if part == "encoder" and spec.startswith("swin"):
        values["patch_size"] = [64, 64, 64]  # instance norm needs two voxels at stride 32
    if part == "encoder" and spec.startswith("mednext"):
        values["patch_size"] = [32, 32, 32]
    if part == "router":
        values["experts"] = "linear(n=4)"  # the routers meet the linear experts here, the gated ones elsewhere
    if part == "head" and spec.startswith("plain"):
        values |= {"fusion": "uniform", "text_encoder": "none", "text_dim": 3}
    return MoMEConfig(**values)


def make_model(part: str, spec: str, seed: int = 0) -> MoME:
    torch.manual_seed(seed)
    model = MoME(make_config(part, spec)).eval()
    if spec == "label_group":  # it finds the label of a prompt among the rows of the bank
        model.text_bank.set(torch.randn(3, 12))
    return model


def inputs(model: MoME, batch: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = model.config.patch_size[0]
    return {
        "volume": torch.rand(batch, 1, side, side, side, generator=generator),
        "text_PT": torch.randn(2, model.config.text_dim, generator=generator),
    }


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers, those included that no checkpoint holds."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


@every_part
def test_meta_device_build(part: str, spec: str) -> None:
    with torch.device("meta"):
        model = MoME(make_config(part, spec))
    assert all(tensor.is_meta for tensor in state(model).values())


@every_part
def test_save_and_load_is_bit_equal(part: str, spec: str, tmp_path: Path) -> None:
    model = make_model(part, spec)
    model.save_pretrained(tmp_path)
    again = MoME.from_pretrained(tmp_path).eval()
    for name, tensor in state(model).items():
        assert torch.equal(tensor, state(again)[name]), name
    given = inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, again(**given).logits)


@every_part
def test_every_key_can_be_missing(part: str, spec: str, tmp_path: Path) -> None:
    """A dropped key is initialised afresh, finite, and no other key is touched; one key of each kind."""
    model = make_model(part, spec)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    reset = {name.rsplit(".", 1)[-1]: name for name in tensors}  # one key for each kind of parameter…
    for module_type in {type(module) for module in model.modules()}:  # … of each type of module
        for path, module in model.named_modules():
            if type(module) is module_type:
                own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
                reset |= {f"{module_type.__name__}.{n}": f"{path}.{n}" if path else n for n in own}
                break
    check_missing(sorted(set(reset.values()) & set(tensors)), tensors, tmp_path)


def check_missing(keys: list[str], tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Drops each of the keys in turn from the weights in the folder, and loads the rest."""
    for key in keys:
        save_file({k: v for k, v in tensors.items() if k != key}, folder / "model.safetensors", {"format": "pt"})
        loaded = state(MoME.from_pretrained(folder, allow_missing=True))
        assert torch.isfinite(loaded[key].float()).all(), key
        for name, tensor in tensors.items():
            if name != key:
                assert torch.equal(loaded[name], tensor), f"{name} changed when {key} was missing"


# Together these hold every part of the tiny presets.
TINY_PRESETS = {
    "mome": {},
    "plain": {"experts": "linear", "fusion": "last", "head": "plain", "text_encoder": "none", "text_dim": 3},
}


@pytest.mark.parametrize("preset", sorted(TINY_PRESETS))
def test_each_key_of_the_tiny_presets_parts_can_be_missing(preset: str, tmp_path: Path) -> None:
    """All keys, one after the other; the test above takes one key of each kind, but meets every part."""
    torch.manual_seed(0)
    model = MoME(MoMEConfig(**{**BASE, "encoder": "unet(channels=[4, 8], decoder_depth=1)", **TINY_PRESETS[preset]}))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    check_missing(sorted(tensors), tensors, tmp_path)


@every_part
def test_loads_in_bfloat16(part: str, spec: str, tmp_path: Path) -> None:
    model = make_model(part, spec)
    model.save_pretrained(tmp_path)
    half = MoME.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for name, tensor in half.named_parameters():
        assert tensor.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name
    given = inputs(half)
    with torch.no_grad():
        logits = half(volume=given["volume"].bfloat16(), text_PT=given["text_PT"]).logits
    assert torch.isfinite(logits.float()).all()


@every_part
def test_no_plain_tensor_attributes(part: str, spec: str) -> None:
    """A tensor that is neither parameter nor buffer stays on the meta device after loading."""
    for path, module in make_model(part, spec).named_modules():
        plain = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not plain, f"{path}: {plain}"


@every_part
def test_gradient_reaches_every_parameter(part: str, spec: str) -> None:
    model = make_model(part, spec).train()
    # Auxiliary losses reach routers even where a gate is normalised to one.
    given = inputs(model, batch=2)
    side = model.config.patch_size[0]
    targets = (torch.rand(2, 2, side, side, side, generator=torch.Generator().manual_seed(2)) > 0.7).float()
    model(**given, targets=targets).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


@every_part
def test_eval_is_deterministic(part: str, spec: str) -> None:
    model = make_model(part, spec)
    given = inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, model(**given).logits)


@pytest.mark.wide
@every_part
def test_compiles_to_the_same_numbers(part: str, spec: str) -> None:
    model = make_model(part, spec)
    given = inputs(model)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.wide
@every_part
def test_exports_to_the_same_numbers(part: str, spec: str) -> None:
    model = make_model(part, spec)
    given = inputs(model)
    with torch.no_grad():
        program = torch.export.export(model, (), given, strict=False)
        got = program.module()(**given)
        logits = got["logits"] if isinstance(got, dict) else got.logits
        torch.testing.assert_close(logits, model(**given).logits, rtol=1e-4, atol=1e-4)
