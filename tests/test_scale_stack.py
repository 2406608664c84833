"""The maps of all scales are stacked at the finest size, with and without gradients."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mome.layers.scale_stack import stack_scales


def test_without_gradients_the_stack_is_the_same_and_maps_are_dropped() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, side, side, 2 * side) for side in (2, 4, 8)]
    expected = torch.stack(
        [F.interpolate(m, size=(8, 8, 16), mode="trilinear", align_corners=False) for m in maps], dim=1
    )
    with_gradients, kept = stack_scales(maps, (8, 8, 16)), len(maps)
    with torch.no_grad():
        without = stack_scales(maps, (8, 8, 16))
    assert without.shape == (2, 3, 3, 8, 8, 16) and torch.equal(without, with_gradients)
    torch.testing.assert_close(without, expected)
    assert kept == 3 and maps == []


def test_gradients_reach_every_map() -> None:
    maps = [torch.ones(1, 1, side, side, side, requires_grad=True) for side in (2, 4)]
    given = list(maps)
    stack_scales(given, (4, 4, 4)).sum().backward()
    gradients = [m.grad for m in maps]
    assert [None if g is None else float(g.sum()) for g in gradients] == [64.0, 64.0]


def test_maps_of_two_types_are_stacked_in_the_wider_one() -> None:
    """Without gradients the first map's type rounded the others."""
    maps = [torch.rand(1, 2, 2, 2, 2).bfloat16(), torch.rand(1, 2, 4, 4, 4)]
    with_gradients = stack_scales(list(maps), (4, 4, 4))
    with torch.no_grad():
        without = stack_scales(list(maps), (4, 4, 4))
    assert without.dtype == with_gradients.dtype == torch.float32
    assert torch.equal(without, with_gradients) and torch.equal(without[:, 1], maps[1])
