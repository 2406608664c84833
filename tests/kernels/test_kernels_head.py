"""The fusion head on the CPU against the reference in float64."""

from __future__ import annotations

import mome_kernels as kernels
import pytest
import torch
from mome_kernels import reference
from mome_kernels.torch_impl import head as torch_head
from op_inputs import head_inputs, same_values_and_gradients


@pytest.mark.parametrize(("scales", "top_k"), [(1, 0), (3, 0), (3, 2), (5, 1)])
def test_head(scales: int, top_k: int) -> None:
    for slope in (0.0, 0.1):
        options = {"top_k": top_k, "negative_slope": slope}
        same_values_and_gradients(kernels.fusion_head, reference.fusion_head, head_inputs(scales), **options)


@pytest.mark.parametrize(("slope", "alive"), [(0.0, False), (0.1, True)])
def test_a_slope_gives_gradients_to_inactive_units(slope: float, alive: bool) -> None:
    """Every hidden unit is negative at every voxel: with ReLU only the last bias has a gradient."""
    f, query, bias, w1, b1, w2, b2, w3, b3 = head_inputs(2)
    dead = (b1.detach() - 1e3).requires_grad_()
    logits = kernels.fusion_head(f, query, bias, w1, dead, w2 * 0, b2 * 0 - 1, w3, b3, negative_slope=slope)
    (gradient,) = torch.autograd.grad(logits.sum(), w3)
    assert bool(gradient.any()) == alive


def test_head_of_an_empty_batch() -> None:
    inputs = head_inputs(batch=0)
    out = kernels.fusion_head(*inputs)
    assert out.shape == (0, 3, 700)
    out.sum().backward()
    assert not inputs[1].grad.any() and inputs[3].grad.shape == (0, 3, 4, 4)


def test_head_refuses_a_number_of_scales_below_zero() -> None:
    with pytest.raises(ValueError, match="top_k is 0 .* or more, got -3"):
        kernels.fusion_head(*head_inputs(2), top_k=-3)


def test_head_refuses_a_slope_out_of_range() -> None:
    for slope in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"negative_slope is a number of at least 0 and below 1, got {slope}"):
            kernels.fusion_head(*head_inputs(2), negative_slope=slope)


def test_head_over_several_tiles(monkeypatch) -> None:
    monkeypatch.setattr(torch_head, "tile_voxels", lambda *_: 128)
    same_values_and_gradients(kernels.fusion_head, reference.fusion_head, head_inputs())


def test_head_equals_grouped_convolutions() -> None:
    """With one scale the head equals the published three grouped 1×1×1 convolutions over the repeated map."""
    f, _, _, w1, b1, w2, b2, w3, b3 = head_inputs(1, batch=1, voxels=27)
    conv, prompts, c = torch.nn.functional.conv3d, 3, 4
    x = f.reshape(1, c, 3, 3, 3).repeat(1, prompts, 1, 1, 1)
    x = conv(x, w1.reshape(prompts * c, c, 1, 1, 1), b1.flatten(), groups=prompts).relu()
    x = conv(x, w2.reshape(prompts * c, c, 1, 1, 1), b2.flatten(), groups=prompts).relu()
    x = conv(x, w3.reshape(prompts, c, 1, 1, 1), b3.flatten(), groups=prompts)
    ours = kernels.fusion_head(f, torch.zeros(prompts, c), torch.zeros(prompts, 1), w1, b1, w2, b2, w3, b3)
    torch.testing.assert_close(ours.reshape(x.shape), x)
