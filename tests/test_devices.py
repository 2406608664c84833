"""Every part and the tile loop keep their tensors on the model's device; no GPU is needed.

Tensors of `FakeTensorMode` have a device and no values, so that one that was left on the CPU raises an error. Only the
forward pass runs: autograd's engine asks for a real device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from mome_kernels import dispatch
from tiny_parts import inputs, make_model, needs_package, own_names, targets, tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mome.inference.logit_ring import LogitRing
from mome.inference.memory_plan import MemoryPlan, Work
from mome.inference.predictor import ModelPredictor
from mome.inference.stream import stream_planes
from mome.inference.tiles import gaussian_window
from mome.modeling import MoME
from mome.registry import LOSSES

CUDA = torch.device("cuda", 0)
# These read values of tensors, which fake ones have not: gates that are zero everywhere, and rows of the bank.
READS_VALUES = {("experts", name) for name in ("conv", "film", "cross_attention")} | {("router", "label_group")}
CASES = [
    pytest.param(kind, name, id=f"{kind}={name}", marks=needs_package(name))
    for kind in ("encoder", "experts", "router", "fusion", "head")
    for name in own_names(kind)
    if (kind, name) not in READS_VALUES
]


@pytest.fixture(autouse=True)
def kernels_without_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for the capability of a device would begin CUDA."""
    monkeypatch.setattr(dispatch, "_has_tensor_cores", lambda device: True)


def fake(tensor: torch.Tensor, device: torch.device = CUDA) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def on_fake_device(model: MoME) -> MoME:
    """A copy of the model with fake tensors; call it inside a FakeTensorMode."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(fake(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    return model


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_forward_of_a_part_stays_on_the_device(kind: str, name: str) -> None:
    model = make_model(**{kind: tiny(kind, name)})
    given, masks = inputs(model), targets(model, 1)
    with FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True)):
        on_fake_device(model)
        predictor = ModelPredictor(model)
        with torch.inference_mode():
            features = predictor.encode(fake(given["volume"]), (0, 16, 32))
            assert predictor.decode(features, fake(given["text_PT"])).device == CUDA
        model.train()
        output = model(fake(given["volume"]), fake(given["text_PT"]), fake(masks), torch.ones(1, 2, device=CUDA).bool())
        assert output.loss is not None and output.loss.device == CUDA
        model.after_step()


@pytest.mark.parametrize("name", [name for name in LOSSES.names() if name not in ("boundary", "weighted_sum")])
def test_losses_stay_on_the_device(name: str) -> None:
    """`boundary` measures distances on the CPU, and `weighted_sum` holds other losses."""
    loss = LOSSES.build(name)
    with FakeTensorMode():
        logits, masks = torch.empty(1, 2, 4, 4, 4, device=CUDA), torch.empty(1, 2, 4, 4, 4, device=CUDA)
        assert loss(logits, masks, torch.empty(1, 2, dtype=torch.bool, device=CUDA)).device == CUDA


class Recorder:
    """A predictor that notes where its tiles lie and how often one is copied there."""

    patch_size = (8, 8, 8)
    device = CUDA

    def __init__(self) -> None:
        self.tiles: list[tuple[Any, int]] = []

    def encode(self, tile: torch.Tensor, origin: tuple[int, int, int]) -> torch.Tensor:
        self.tiles.append((origin, tile.untyped_storage()._cdata))
        assert tile.device == CUDA and tuple(tile.shape) == (1, 1, 8, 8, 8)
        return tile

    def decode(self, features: torch.Tensor, text_PT: torch.Tensor) -> torch.Tensor:
        assert text_PT.device == CUDA
        return features.expand(-1, len(text_PT), -1, -1, -1)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_tile_loop_copies_the_planes_of_a_row_of_tiles_once(axis: int) -> None:
    predictor = Recorder()
    with FakeTensorMode():
        volume, text = torch.empty(1, 1, 12, 12, 12), torch.empty(3, 5)
        for finished in stream_planes(predictor, volume, text, axis=axis, wanted=lambda box: box[axis][0] < 5):
            assert finished.first >= 0
    firsts = {origin[axis] for origin, _ in predictor.tiles}
    assert len(predictor.tiles) == 8 and len({storage for _, storage in predictor.tiles}) == len(firsts) == 2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_tiles_are_the_same_parts_of_the_volume_along_every_axis(axis: int) -> None:
    """On the CPU a tile is a view of the volume at its corner."""
    volume = torch.rand(1, 1, 12, 13, 14, generator=torch.Generator().manual_seed(0))

    class Checked(Recorder):
        device = torch.device("cpu")

        def encode(self, tile: torch.Tensor, origin: tuple[int, int, int]) -> torch.Tensor:
            d, h, w = origin
            assert torch.equal(tile, volume[:, :, d : d + 8, h : h + 8, w : w + 8])
            return tile

        def decode(self, features: torch.Tensor, text_PT: torch.Tensor) -> torch.Tensor:
            return features.expand(-1, len(text_PT), -1, -1, -1)

    for finished in stream_planes(Checked(), volume, torch.zeros(2, 5), axis=axis):
        planes = volume[0, 0].narrow(axis, finished.first, finished.stop - finished.first)
        torch.testing.assert_close(finished.logits(slice(0, 2)), planes.expand(2, *planes.shape))


def test_sums_of_logits_are_on_the_device() -> None:
    with FakeTensorMode():
        ring = LogitRing(2, (12, 12, 12), 8, 0, device=CUDA, dtype=torch.float16)
        window = torch.empty(gaussian_window((8, 8, 8)).shape, device=CUDA)
        ring.add(slice(0, 2), (4, 0, 0), torch.empty(2, 8, 8, 8, device=CUDA), window)
        ring.add_weight((4, 0, 0), window)
        assert ring._sums.device == ring._weights.device == CUDA


def test_plan_for_a_gpu_counts_the_planes_of_the_scan_there() -> None:
    plan, work = MemoryPlan(4, 4), Work((64, 64, 64), (32, 32, 32), (16, 16, 16), 4)
    on_gpu = replace(work, on_gpu=True)
    assert plan.total(work, gpu=True) == 0
    sums = plan.bytes_of(on_gpu)["sums of logits"] - plan.bytes_of(work)["sums of logits"]
    assert sums == 16 * 32 * 32 * 4  # float32 planes of one tile
