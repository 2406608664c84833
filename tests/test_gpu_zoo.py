"""Every router, expert, fusion and head on a GPU, in small models: float32 beside float64 on the CPU, and autocast.

A hard choice of experts flips where a rounding error changes the order of two scores. A flipped token changes the
voxels around it, so that a twentieth of the logits may differ, and gradients are compared by their norm. `-n 12` runs
the file in parallel. `MOME_TEST_DEVICE=cpu` runs it without a GPU.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_settings import exact_float32, wait_for_memory
from matrix import SMALL, Case, cases
from mome_kernels import moe_mlp, reference
from tiny_parts import inputs, make_config, make_model, needs_package, own_names, tiny
from torch import Tensor

from mome.modeling import MoME

DEVICE = os.environ.get("MOME_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")
_REFUSED = {case.names for case in cases(plugins=False) if case.block == "router × expert" and case.refused}


def _models() -> dict[str, dict[str, Any]]:
    """A config for each part, and for each router once more inside the encoder where it is allowed."""
    found: dict[str, dict[str, Any]] = {}
    for router in own_names("router"):
        found[f"router {router}"] = {"router": tiny("router", router), "experts": "mlp(n=4, hidden=8)"}
    for expert in own_names("experts"):
        found[f"experts {expert}"] = {"experts": tiny("experts", expert), "router": "topk(k=2)"}
        if ("soft", expert) not in _REFUSED:
            found[f"experts {expert} with soft"] = {"experts": tiny("experts", expert), "router": "soft"}
    for fusion in own_names("fusion"):
        for head in own_names("head"):
            found[f"fusion {fusion} with {head}"] = {"fusion": tiny("fusion", fusion), "head": tiny("head", head)}
    for case in cases(plugins=False):
        if _inside(case):
            found[f"{case.names[0]} inside an encoder"] = case.config
    return {name: {**SMALL, **config} for name, config in found.items()}


def _inside(case: Case) -> bool:
    return case.block == "router inside an encoder" and not case.refused


MODELS = _models()
# Where a rounding error crosses the kink of an activation, gradients change by percents. With volumes of these seeds,
# no hidden value is so near to one; see test_kinks.py.
SMOOTH_SEEDS = {"experts linear": 3}


def run(model: MoME, given: dict[str, Tensor], autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a fixed weighted sum of them, all in float64 on the CPU."""
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    given = {name: tensor.to(device, dtype) for name, tensor in given.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        logits = model(**given).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (logits * weights.to(device, logits.dtype)).sum().backward()
    gradients = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach().double().cpu(), gradients


def difference(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The norm of the difference of all gradients over their norm."""
    assert ours.keys() == expected.keys()
    apart = sum(float((ours[name] - expected[name]).square().sum()) for name in ours)
    return (apart / sum(float(gradient.square().sum()) for gradient in expected.values())) ** 0.5


def given_to(name: str, model: MoME) -> dict[str, Tensor]:
    """The inputs of a model, which are away from kinks where the usual ones are not."""
    given = inputs(model, batch=2)
    if name in SMOOTH_SEEDS:
        generator = torch.Generator().manual_seed(SMOOTH_SEEDS[name])
        given["volume"] = torch.rand(given["volume"].shape, generator=generator)
    return given


def _chooses(name: str) -> bool:
    """Whether a model's router sends a token to some experts only."""
    return not any(router in str(MODELS[name].get("router", "")) for router in ("soft", "uniform"))


@pytest.fixture(autouse=True)
def _settings(one_thread: None) -> Iterator[None]:
    if DEVICE == "cuda":
        wait_for_memory()
    with exact_float32():
        yield


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_package(*name.split()), id=name.replace(" ", "-")) for name in MODELS]
)
def test_the_part_on_the_device(name: str) -> None:
    """In eval, where no router draws random numbers; the gradients are those of evaluation."""
    exact = make_model(**MODELS[name])
    given = given_to(name, exact)
    if MODELS[name].get("router", "").startswith("label_group"):
        given["text_PT"] = exact.text_bank.rows(["liver", "aorta"])
    model, half = copy.deepcopy(exact).to(DEVICE), copy.deepcopy(exact).to(DEVICE)
    expected, wanted = run(exact.double(), given)
    logits, gradients = run(model, given)
    again, _ = run(model, given)
    scale = expected.abs().max()
    apart = ((logits - expected).abs() > 1e-3 * scale).double().mean()
    assert float(apart) <= 0.05, float(apart)
    assert difference(gradients, wanted) <= (0.01 if apart == 0 else 0.3)
    assert torch.equal(again, logits) or ((again - logits).abs().max() <= 1e-4 * scale)
    rough, steep = run(half, given, autocast=True)
    assert torch.isfinite(rough).all()
    assert [name for name, gradient in steep.items() if not torch.isfinite(gradient).all()] == []
    if apart == 0 and not _chooses(name):  # bfloat16 makes hard choices flip, a quarter of them in such small models
        assert float(((rough - expected).abs() > 0.1 * scale).double().mean()) <= 0.2
    assert steep.keys() == wanted.keys()


@pytest.mark.parametrize(("width", "hidden"), [(4, 8), (8, 24), (37, 50), (48, 8)])
def test_gradients_of_narrow_experts_in_bfloat16(width: int, hidden: int) -> None:
    """Widths at which a compiler once broke a kernel; in whole models rounding hides wrong gradients."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator) * scale
        return values.to(DEVICE, torch.bfloat16).requires_grad_()

    x, ids = leaf(300, width), torch.rand(300, 4, generator=generator).topk(2).indices.to(DEVICE)
    weights = torch.rand(300, 2, generator=generator).to(DEVICE).requires_grad_()
    up, up_bias = leaf(4, hidden, width, scale=width**-0.5), leaf(4, hidden)
    down, down_bias = leaf(4, width, hidden, scale=hidden**-0.5), leaf(4, width)
    leaves = [x, weights, up, up_bias, down, down_bias]
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in leaves]
    grad = torch.randn(300, width, generator=generator).bfloat16()
    out = moe_mlp(x, ids, weights, up, up_bias, down, down_bias)
    wanted_out = reference.moe_mlp(exact[0], ids.cpu(), *exact[1:])
    found = [out, *torch.autograd.grad(out, leaves, grad.to(DEVICE))]
    wanted = [wanted_out, *torch.autograd.grad(wanted_out, exact, grad.double())]
    for ours, expected in zip(found, wanted, strict=True):
        error = (ours.detach().double().cpu() - expected.detach()).abs().max() / expected.detach().abs().max()
        assert float(error) <= 3e-2


def test_every_part_is_here() -> None:
    for kind in ("router", "experts", "fusion", "head"):
        assert all(any(part in name.split() for name in MODELS) for part in own_names(kind))
    for config in MODELS.values():
        make_config(**config)
