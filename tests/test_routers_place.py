"""Routers that learn nothing: hash, random and uniform. Tiles agree where they overlap."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from small_models import small, volume
from test_routers_groups import build, layer

from mome.errors import InputError
from mome.map_context import DEFAULT_CONTEXT, MapContext
from mome.registry import ROUTERS

BY_PLACE = ["hash(window=3)", "hash(window=1, seed=5)", "random(k=2)", "random(k=1, seed=3)"]


def origin(*voxels: int) -> torch.Tensor:
    return torch.tensor([voxels])


def literal_hash(cell: tuple[int, int, int], seed: int) -> int:
    """The same function in Python's integers."""

    def scramble(value: int) -> int:
        value = (value ^ (value >> 16)) * 0x45D9F3B % 2**31
        value = (value ^ (value >> 15)) * 0x2C1B3C6D % 2**31
        return value ^ (value >> 16)

    result = seed % 2**31
    for axis, at in enumerate(cell):
        result = scramble(scramble((result + axis + 1) % 2**31) ^ (at % 2**31))
    return result


def test_hash_is_a_function_of_the_cell_and_the_seed() -> None:
    router = build("hash(window=3, seed=7)", experts=5)
    context = MapContext(torch.tensor([[0, 6, -4], [12, 1, 900]]), stride=(2, 1, 4))
    routing = router(torch.randn(2, 3, 4, 5, 4), context)
    want = []
    for base in context.origin_B3.tolist():
        for d in range(3):
            for h in range(4):
                for w in range(5):
                    cell = tuple((p + i * s) // 3 for p, i, s in zip(base, (d, h, w), (2, 1, 4), strict=True))
                    want.append(literal_hash(cell, 7) % 5)
    assert routing.ids_TK[:, 0].tolist() == want and torch.all(routing.weights_TK == 1)
    assert torch.equal(routing.counts_E, torch.tensor(want).bincount(minlength=5)) and len(set(want)) == 5


@pytest.mark.parametrize("spec", BY_PLACE)
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 4, 2)])
def test_a_map_in_two_tiles_is_the_map(spec: str, stride: tuple[int, int, int]) -> None:
    mixture, x = layer("linear(n=4)", spec), torch.randn(1, 8, 4, 6, 4)
    start = torch.tensor([[16, 8, 32]])
    whole, _ = mixture(x, MapContext(start, stride))
    for first, last in ((0, 5), (3, 8)):  # two tiles that overlap
        tile, _ = mixture(x[:, first:last], MapContext(start + torch.tensor([first * stride[0], 0, 0]), stride))
        assert torch.equal(tile, whole[:, first:last])


@pytest.mark.parametrize("spec", BY_PLACE)
def test_only_the_place_decides(spec: str) -> None:
    """Neither the values, nor training, nor earlier calls: so a resumed run routes as before."""
    router = build(spec, experts=4)
    shape, context = (1, 4, 4, 4, 4), MapContext(origin(8, 0, 0))
    first = router.train()(torch.randn(shape), context)
    torch.manual_seed(99)
    again = build(spec, experts=4).eval()(torch.randn(shape), context)
    assert torch.equal(first.ids_TK, again.ids_TK) and not first.losses and router.reads_place
    elsewhere = router(torch.randn(shape), MapContext(origin(108, 0, 0)))
    assert not torch.equal(elsewhere.ids_TK, first.ids_TK)
    assert torch.equal(router(torch.randn(shape), DEFAULT_CONTEXT).ids_TK, build(spec, experts=4)(
        torch.randn(shape), MapContext(origin(0, 0, 0))).ids_TK)  # fmt: skip


def test_scales_agree_where_their_voxels_lie_in_one_cube() -> None:
    router = build("hash(window=4)", experts=4)
    fine = router(torch.randn(1, 8, 8, 8, 4), MapContext(origin(4, 8, 0))).ids_TK.view(8, 8, 8)
    coarse = router(torch.randn(1, 4, 4, 4, 4), MapContext(origin(4, 8, 0), (2, 2, 2))).ids_TK.view(4, 4, 4)
    assert torch.equal(fine[::2, ::2, ::2], coarse)
    cubes = fine.view(2, 4, 2, 4, 2, 4)
    assert torch.equal(cubes, cubes[:, :1, :, :1, :, :1].expand(cubes.shape))


def test_random_draws_every_pair_of_experts_equally_often() -> None:
    routing = build("random(k=2)", experts=4)(torch.zeros(1, 24, 24, 24, 4), DEFAULT_CONTEXT)
    pairs = Counter(tuple(sorted(pair)) for pair in routing.ids_TK.tolist())
    assert len(pairs) == 6 and all(first != second for first, second in pairs)
    expected = 24**3 / 6
    assert sum((count - expected) ** 2 / expected for count in pairs.values()) < 20.5  # chi-squared of 5, p = 0.001
    assert torch.all(routing.weights_TK == 0.5)
    # neighbours are independent along every axis
    first = routing.ids_TK[:, 0].view(24, 24, 24)
    for axis in range(3):
        same = (first.narrow(axis, 0, 23) == first.narrow(axis, 1, 23)).float().mean()
        assert 0.23 < same < 0.27


@pytest.mark.parametrize("spec", ["hash(window=1, seed={})", "random(seed={})"])
def test_seeds_differ_and_experts_share_alike(spec: str) -> None:
    ids = [build(spec.format(s), experts=5)(torch.zeros(1, 20, 20, 20, 4), DEFAULT_CONTEXT).ids_TK for s in (0, 1)]
    assert 0.18 < (ids[0] == ids[1]).float().mean() < 0.22
    for one in ids:
        counts = one.flatten().bincount(minlength=5)
        assert ((counts - 1600) ** 2 / 1600).sum() < 18.5  # chi-squared of 4, p = 0.001


def test_uniform_is_the_mean_of_the_experts() -> None:
    mixture, x = layer("linear(n=3)", "uniform"), torch.randn(2, 2, 3, 2, 4)
    y, routing = mixture(x, DEFAULT_CONTEXT)
    weight, bias = mixture.experts.weight_EDD, mixture.experts.bias_ED
    want = sum(x @ weight[e].T + bias[e] for e in range(3)) / 3
    torch.testing.assert_close(y, want)
    assert routing.counts_E.tolist() == [24] * 3


def test_the_model_hands_the_place_to_the_router() -> None:
    model = small(experts="linear(n=4)", router="hash(window=2)")
    with torch.no_grad():
        near, same, far = (
            model(volume(), torch.ones(1, 12), origin_B3=origin(*at)).logits for at in ((0, 0, 0), (1, 0, 0), (2, 0, 0))
        )
    assert torch.equal(near, model(volume(), torch.ones(1, 12)).logits)
    assert not torch.equal(near, far) and not torch.equal(near, same)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ("hash(window=0)", "window of router hash is at least 1, got 0"),
        ("hash(seed=-1)", "seed of router hash is at least 0, got -1"),
        ("random(k=0)", "router 'random' picks k=0 experts of 3"),
        ("random(k=4)", "router 'random' picks k=4 experts of 3"),
    ],
)
def test_impossible_arguments_are_refused_when_built(router: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ROUTERS.build(router, dim=4, num_experts=3)
