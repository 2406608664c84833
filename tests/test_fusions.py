"""The fusions `gated`, `pooled`, `cross_attention`: literal loops, tiles of voxels, and absent scales."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import small, volume
from torch import nn

from mome.errors import InputError
from mome.layers import predict as module
from mome.layers.predict import predict
from mome.registry import FUSIONS, HEADS
from mome.routers.fusion.base import Fusion
from mome.training.config import TrainConfig
from mome.training.optimizer import build_optimizer, set_learning_rate

B, P, S, C, T, V = 2, 3, 3, 4, 5, 30
NEW = ["gated(dim=6)", "pooled(dim=6)", "cross_attention(tokens=3, dim=6)"]
MASKED = [*NEW, "text_guided(dim=6)", "text_guided(dim=6, top_k=2)", "uniform", "learned"]


def build(spec: str) -> Fusion:
    torch.manual_seed(0)
    fusion = FUSIONS.build(spec, channels=C, text_dim=T, scales=S)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.7)
    return fusion


def given() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, S, C, V, generator=generator), torch.randn(P, T, generator=generator)


def head() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(2)
    built = HEADS.build("dynamic(hidden=8, negative_slope=0.1)", channels=C, text_dim=T, bottleneck_channels=6)
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.5)
    return built, torch.randn(B, 6, 2, 2, 2)


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score) for score in scores]
    return [power / sum(powers) for power in powers]


def gated_weights(f: Fusion, maps_SCV: torch.Tensor, row_T: torch.Tensor, v: int) -> list[float]:
    query_D = f.scores.query.weight @ row_T + f.scores.query.bias
    products = [float(query_D @ (f.scores.key.weight_DC @ maps_SCV[s, :, v])) for s in range(S)]
    scores = [product / 6**0.5 + float(f.scores.bias_S[s]) for s, product in enumerate(products)]
    return [1 / (1 + math.exp(-score)) for score in scores]


def pooled_weights(f: Fusion, maps_SCV: torch.Tensor, row_T: torch.Tensor, v: int) -> list[float]:
    query_D = f.scores.query.weight @ row_T + f.scores.query.bias
    means = [sum(maps_SCV[s, :, u] for u in range(V)) / V for s in range(S)]
    keys = [f.scores.key.weight_DC @ mean for mean in means]
    return softmax([float(query_D @ key) / 6**0.5 + float(f.scores.bias_S[s]) for s, key in enumerate(keys)])


def cross_attention_weights(f: Fusion, maps_SCV: torch.Tensor, row_T: torch.Tensor, v: int) -> list[float]:
    query_D = f.query.weight_DC @ torch.cat([maps_SCV[s, :, v] for s in range(S)])
    tokens = [f.tokens.weight[6 * m : 6 * m + 6] @ row_T + f.tokens.bias[6 * m : 6 * m + 6] for m in range(3)]
    attention = softmax([float(query_D @ (f.key.weight @ token)) / 6**0.5 for token in tokens])
    scores = [
        sum(a * float(f.score.weight[s] @ t) for a, t in zip(attention, tokens, strict=True)) + float(f.score.bias[s])
        for s in range(S)
    ]
    return softmax(scores)


LITERAL = dict(zip(NEW, (gated_weights, pooled_weights, cross_attention_weights), strict=True))


@pytest.mark.parametrize("spec", NEW)
def test_a_fusion_follows_its_formula(spec: str) -> None:
    fusion, (features, text) = build(spec), given()
    with torch.no_grad():
        got, weights = fusion(features, text), fusion.weights(features, text).expand(B, P, S, V)
        for b in range(B):
            for p in range(P):
                for v in (0, 7, V - 1):
                    want = LITERAL[spec](fusion, features[b], text[p], v)
                    torch.testing.assert_close(weights[b, p, :, v], torch.tensor(want), rtol=1e-4, atol=1e-5)
                    mixed = sum(w * features[b, s, :, v] for s, w in enumerate(want))
                    torch.testing.assert_close(got[b, p, :, v], mixed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spec", NEW)
def test_tiles_of_voxels_change_neither_logits_nor_gradients(
    spec: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fusion, (features, text), (last, bottleneck) = build(spec), given(), head()
    present = torch.tensor([[True, True, False]] * P) if masked else None
    results = []
    for numbers in (10**9, B * P * C * 7):  # one tile, then five, the last one shorter
        monkeypatch.setattr(module, "_TILE_ELEMENTS", numbers)
        fusion.zero_grad()
        x = features.clone().requires_grad_()
        logits = predict(fusion, last, x, text, bottleneck, present)
        logits.square().sum().backward()
        results.append([logits.detach(), x.grad, *(parameter.grad for parameter in fusion.parameters())])
    for whole, tiled in zip(*results, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-4)


def test_pooled_shares_weights_within_a_patch_only() -> None:
    """The weights are the same at every voxel, follow the text and the patch, and ignore the rest of the batch."""
    fusion, (features, text) = build("pooled(dim=6)"), given()
    both = fusion.weights(features, text)
    assert both.shape == (B, P, S, 1)
    assert not torch.allclose(both[0], both[1]) and not torch.allclose(both[:, 0], both[:, 1])
    torch.testing.assert_close(fusion.weights(features[:1], text), both[:1])
    torch.testing.assert_close(fusion.weights(features[..., torch.randperm(V)], text), both)


def test_attention_varies_over_voxels_and_prompts() -> None:
    fusion, (features, text) = build("cross_attention(tokens=3, dim=6)"), given()
    attention = fusion.attention(features, text)
    assert attention.shape == (B, P, 3, V)
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(B, P, V))
    assert attention.std(dim=-1).min() > 0.01  # of every token of every prompt
    assert attention.argmax(dim=2).unique().numel() == 3  # every token is the strongest somewhere
    assert not torch.allclose(attention[:, 0], attention[:, 1])


def test_attention_of_a_new_model_varies_over_voxels() -> None:
    model = small(fusion="cross_attention(tokens=4, dim=8)")
    maps = model.encode(volume()).scales_BSCDHW.flatten(3)
    assert model.fusion.attention(maps, torch.randn(2, 12)).std(dim=-1).min() > 1e-4


def test_gates_are_independent() -> None:
    """Another map of one scale changes the gate of no other scale; the gates need not sum to one."""
    fusion, (features, text) = build("gated(dim=6)"), given()
    other = features.clone()
    other[:, 1] += 1.0
    before, after = fusion.weights(features, text), fusion.weights(other, text)
    assert torch.equal(before[:, :, [0, 2]], after[:, :, [0, 2]]) and not torch.equal(before[:, :, 1], after[:, :, 1])
    assert (before.sum(dim=2) - 1).abs().max() > 0.1


def test_gates_of_a_new_model_start_near_the_mean() -> None:
    model = small(fusion="gated(dim=8)", encoder="unet(channels=[8, 8, 8, 16])")
    assert model.fusion.scores.bias_S.sigmoid().sub(1 / 3).abs().max() < 1e-6


@pytest.mark.parametrize("spec", MASKED)
def test_an_absent_scale_gets_no_weight(spec: str) -> None:
    """Neither logits nor other gradients change with its map; a prompt that has it is not touched."""
    fusion, (features, text), (last, bottleneck) = build(spec), given(), head()
    present = torch.tensor([[True, True, False], [True, True, True], [True, True, False]])
    other = features.clone()
    other[:, 2] = torch.randn(B, C, V, generator=torch.Generator().manual_seed(9))
    first, second = (predict(fusion, last, x, text, bottleneck, present) for x in (features, other))
    assert torch.equal(first[:, [0, 2]], second[:, [0, 2]]) and not torch.allclose(first[:, 1], second[:, 1])
    alone = predict(fusion, last, features, text[1:2], bottleneck)
    torch.testing.assert_close(first[:, 1:2], alone, rtol=1e-4, atol=1e-4)
    if spec != "pooled(dim=6)":  # which means another set of voxels by its maps
        weights = fusion.weights(features, text, present)
        assert not weights.expand(-1, P, -1, -1)[:, [0, 2], 2].any()
    x = features.clone().requires_grad_()
    predict(fusion, last, x, text[:1], bottleneck, present[:1]).sum().backward()
    assert x.grad.isfinite().all() and not x.grad[:, 2].any() and x.grad[:, :2].any()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cross_attention(tokens=1)", "tokens=1: attention to one token is the same at every voxel"),
        ("cross_attention(dim=0)", "dim of fusion cross_attention is at least 1, got 0"),
        ("gated(dim=0)", "dim of fusion gated is at least 1, got 0"),
        ("pooled(dim=0)", "dim of fusion pooled is at least 1, got 0"),
    ],
)
def test_impossible_arguments_are_refused(spec: str, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        build(spec)


@pytest.mark.parametrize("spec", ["text_guided(dim=8)", "gated(dim=8)", "pooled(dim=8)"])
def test_a_new_model_weighs_scales_alike_and_text_moves_its_queries_slowly(spec: str) -> None:
    """With the rate of the other weights, queries grew until one scale was left (the neck study)."""
    model = small(fusion=spec)
    maps, text = model.encode(volume()).scales_BSCDHW.flatten(3), torch.randn(2, 12)
    weights = model.fusion.weights(maps, text)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / maps.shape[1]), atol=0.02, rtol=0)
    model(volume(), text, torch.ones(1, 2, 16, 16, 16)).loss.backward()
    query = model.fusion.scores.query.weight
    before = query.detach().clone()
    assert query.grad.abs().max() > 0 and model.fusion.scores.key.weight_DC.grad.abs().max() > 0
    optimizer = build_optimizer(model, TrainConfig(learning_rate=0.1, weight_decay=0.0))
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    assert (query - before).abs().max().item() == pytest.approx(
        0.1 / 12**0.5, rel=1e-2
    )  # AdamW's first step is the rate
