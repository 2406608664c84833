"""The library on a CUDA device gives what it gives on the CPU; without one these tests are skipped.

`pytest -n 0 tests/test_gpu.py` takes seconds.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_settings import exact_float32, wait_for_memory
from tiny_parts import TINY, inputs, make_model, needs_package, own_names, targets, tiny

from mome import MoME, create_model
from mome.data.phantom import phantom
from mome.inference import Segmenter
from mome.metrics import dice
from mome.presets import PRESETS, preset
from mome.volumes import Volume

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

CUDA = torch.device("cuda")
NEEDS_MONAI = {"swin_unetr", "mednext", "monai"}


@pytest.fixture(autouse=True)
def _settings(one_thread: None) -> Iterator[None]:
    wait_for_memory()
    with exact_float32():
        yield


def marks(*names: str) -> list[pytest.MarkDecorator]:
    """Skips where the package of a part is missing."""
    missing = NEEDS_MONAI.intersection(names) and importlib.util.find_spec("monai") is None
    return [pytest.mark.skip(reason="monai is not installed")] if missing else needs_package(*names)


def part_name(config: str | dict[str, Any]) -> str:
    return config["name"] if isinstance(config, dict) else config.partition("(")[0]


def encoder_of(name: str) -> str:
    return part_name(preset(name)["model"]["encoder"])


def tiny_parts_of(name: str) -> dict[str, str]:
    """A preset's kinds of parts at tiny sizes."""
    parts = preset(name)["model"]
    kinds = {kind: part_name(parts[kind]) for kind in TINY if kind != "text_encoder" and kind in parts}
    single = {"linear": "linear(n=1)"}
    return {kind: single.get(part, TINY[kind].get(part, part)) for kind, part in kinds.items()}


# The sizes of a family have the same parts, so that one of them stands for all.
DISTINCT = {tuple(tiny_parts_of(name).items()): name for name in PRESETS}.values()


def logits_of(model: MoME, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    given = {name: tensor.to(device) for name, tensor in inputs(model).items()}
    model.to(device)  # outside of the inference mode, whose tensors cannot be trained
    with torch.inference_mode(), torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        return model(**given).logits.float().cpu()


def assert_near(found: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """Compares means, since rounding may send a voxel to another expert."""
    assert torch.isfinite(found).all() and found.shape == expected.shape
    assert float((found - expected).abs().mean()) <= share * float(expected.abs().mean())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(encoder_of(name))) for name in DISTINCT])
def test_preset_at_tiny_size_is_as_on_the_cpu(name: str, precision: str) -> None:
    model = make_model(**tiny_parts_of(name))
    expected = logits_of(model, torch.device("cpu"))
    found = logits_of(model, CUDA, torch.bfloat16 if precision == "bf16" else None)
    assert_near(found, expected, 2e-3 if precision == "fp32" else 5e-2)


# tests/test_gpu_zoo.py runs experts, fusions and heads.
PARTS = [
    pytest.param(kind, name, id=f"{kind}={name}", marks=marks(name))
    for kind in ("encoder", "router")
    for name in own_names(kind)
]


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_part_runs_and_trains_as_on_the_cpu(kind: str, name: str) -> None:
    """One forward pass in eval, and one step of training whose gradients are finite."""
    model = make_model(**{kind: tiny(kind, name)})
    expected = logits_of(model, torch.device("cpu"))
    assert_near(logits_of(model, CUDA), expected, 2e-3)
    model.train()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**{k: v.cuda() for k, v in inputs(model).items()}, targets=targets(model, 1).cuda()).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.is_cuda and torch.isfinite(g).all() for g in gradients)
    torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True).step()
    model.after_step()


def test_gradients_are_those_of_the_cpu() -> None:
    model = make_model().train()
    twin = copy.deepcopy(model).to(CUDA)
    for one in (model, twin):
        device = next(one.parameters()).device
        given = {k: v.to(device) for k, v in inputs(model, 2).items()}
        one(**given, targets=targets(model, 2).to(device)).loss.backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        if a.grad is not None:
            assert b.grad is not None
            difference = (b.grad.cpu() - a.grad).norm() / a.grad.norm().clamp(min=1e-6)
            assert difference < 2e-2, f"{name}: {difference:.2g}"


@cache
def scan(model: str) -> Volume:
    """A synthetic person: the head and neck, or the torso."""
    if model == "mome-ct-tiny":
        drawn = phantom(3, spacing=(4.0, 4.0, 4.0))
    else:
        drawn = phantom(3, spacing=(5.0, 5.0, 5.0), z_range=(-400.0, -50.0))
    return Volume(drawn.array, drawn.affine)


@cache
def on_cpu(model: str) -> dict[str, Any]:
    segmenter = Segmenter(model, precision="fp32")
    return dict(segmenter.segment(scan(model), list(segmenter.model.config.trained_labels)).masks)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["mome-ct-tiny", "mome-ct-torso-tiny"])
def test_bundled_model_segments_as_on_the_cpu(model: str, precision: str) -> None:
    segmenter = Segmenter(model, device="cuda", precision=precision)
    result = segmenter.segment(scan(model), list(segmenter.model.config.trained_labels))
    large = {name: mask for name, mask in on_cpu(model).items() if mask.sum() >= 100}
    assert large
    least = 0.999 if precision == "fp32" else 0.97
    scores = {name: dice(result.masks[name], mask) for name, mask in large.items()}
    assert all(score >= least for score in scores.values()), scores


OPTIONS: dict[str, dict[str, Any]] = {
    "mirror": {"mirror": "lr"},
    "exact": {"exact": True, "overlap": 0.25},
    "chunk": {"prompt_chunk": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_segmenter_work(options: dict[str, Any]) -> None:
    segmenter = Segmenter("mome-ct-tiny", device="cuda", precision="fp32", **options)
    prompts = ["parotid_gland_left", "parotid_gland_right", "spinal_cord"]
    result = segmenter.segment(scan("mome-ct-tiny"), prompts, probabilities=True, disagreement=True, statistics=True)
    assert result.masks["spinal_cord"].any() and result.disagreement is not None


def test_model_on_a_gpu_is_saved_and_loaded(tmp_path: Path) -> None:
    model = make_model().to(CUDA)
    model.save_pretrained(tmp_path / "model")
    loaded = MoME.from_pretrained(tmp_path / "model").to(CUDA).eval()
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(logits_of(model, CUDA), logits_of(loaded, CUDA))


def test_whole_preset_with_packages_of_mome_alone_trains_one_step() -> None:
    model = create_model("mome_ct_tiny").to(CUDA).train()
    volume, text = torch.rand(1, 1, 64, 64, 64, device=CUDA), torch.randn(2, model.config.text_dim, device=CUDA)
    masks = (torch.rand(1, 2, 64, 64, 64, device=CUDA) > 0.7).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses = []
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(volume, text, masks).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
