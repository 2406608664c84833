"""For every registered part: what loading, compiling and exporting demand of a module, on one small model each.

tests/test_matrix.py trains, evaluates, saves and loads them, in pairs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import BASE, inputs, make_config, make_model, needs_package, state, tiny

from mome.configuration import MoMEConfig
from mome.modeling import MoME
from mome.registry import PARTS


def _cases() -> list[Any]:
    return [
        pytest.param(kind, tiny(kind, name), id=f"{kind}-{name}", marks=needs_package(name))
        for kind in PARTS
        if kind != "text_encoder"  # it is no part of the model
        for name in PARTS[kind].names()
    ]


ALL_PARTS = _cases()
every_part = pytest.mark.parametrize(("part", "spec"), ALL_PARTS)


def values(part: str, spec: str) -> dict[str, str]:
    """The part of interest, and what it needs of the others to be tested alone."""
    if part == "router":
        return {part: spec, "experts": "linear(n=4)"}  # the gated experts meet the routers elsewhere
    if part == "head" and spec.startswith("plain"):
        return {part: spec, "fusion": "uniform", "text_encoder": "none", "text_dim": 3}
    return {part: spec}


@every_part
def test_meta_device_build(part: str, spec: str) -> None:
    with torch.device("meta"):
        model = MoME(make_config(**values(part, spec)))
    assert all(tensor.is_meta for tensor in state(model).values())


@every_part
def test_every_key_can_be_missing(part: str, spec: str, tmp_path: Path) -> None:
    """A dropped key is initialised afresh, finite, and no other key is touched; one key of each kind."""
    model = make_model(**values(part, spec))
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
    model = make_model(**values(part, spec))
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
    for path, module in make_model(**values(part, spec)).named_modules():
        plain = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not plain, f"{path}: {plain}"


@pytest.mark.wide
@every_part
def test_compiles_to_the_same_numbers(part: str, spec: str) -> None:
    model = make_model(**values(part, spec))
    given = inputs(model)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.wide
@every_part
def test_exports_to_the_same_numbers(part: str, spec: str) -> None:
    model = make_model(**values(part, spec))
    given = inputs(model)
    with torch.no_grad():
        program = torch.export.export(model, (), given, strict=False)
        got = program.module()(**given)
        logits = got["logits"] if isinstance(got, dict) else got.logits
        torch.testing.assert_close(logits, model(**given).logits, rtol=1e-4, atol=1e-4)
