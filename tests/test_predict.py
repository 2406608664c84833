"""Fusion and head: the fused op against the plain forward of the parts, and tiles of voxels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mome.layers import predict as module
from mome.layers.predict import predict, predict_in_tiles
from mome.registry import FUSIONS, HEADS

FUSION_STRINGS = ["text_guided(dim=6)", "text_guided(dim=6, top_k=2)", "uniform", "learned", "last"]
HEAD_STRINGS = ["dynamic(hidden=8, negative_slope=0.1)", "dynamic(hidden=8)", "plain"]


def parts(fusion: str, head: str) -> tuple[nn.Module, nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    scales = 1 if fusion == "last" else 3
    built = (
        FUSIONS.build(fusion, channels=4, text_dim=5, scales=scales),
        HEADS.build(head, channels=4, text_dim=5, bottleneck_channels=6),
    )
    for part in built:
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.5)
    given = torch.randn(2, scales, 4, 30), torch.randn(3, 5), torch.randn(2, 6, 2, 2, 2)
    return *built, given


@pytest.mark.parametrize("head", HEAD_STRINGS)
@pytest.mark.parametrize("fusion", FUSION_STRINGS)
def test_the_fused_op_equals_the_plain_forward(fusion: str, head: str) -> None:
    f, h, (features, text, bottleneck) = parts(fusion, head)
    plain = h(f(features, text), text, bottleneck)
    assert plain.shape == (2, 3, 30)
    torch.testing.assert_close(predict(f, h, features, text, bottleneck), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", [*HEAD_STRINGS, "mask_embedding"])
@pytest.mark.parametrize("fusion", [*FUSION_STRINGS, "gated", "pooled", "cross_attention"])
def test_logits_under_autocast_are_float32_with_and_without_the_fused_op(fusion: str, head: str) -> None:
    f, h, (features, text, bottleneck) = parts(fusion, head)
    wanted = predict(f, h, features, text, bottleneck).detach()
    with torch.autocast("cpu", torch.bfloat16):
        got = predict(f, h, features.bfloat16(), text, bottleneck)
    assert got.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.1 * float(wanted.abs().max()))


def test_text_guided_fusion_follows_its_formula() -> None:
    f, _, (features, text, _) = parts("text_guided(dim=6)", "plain")
    query, key, bias = f.scores.query, f.scores.key.weight_DC, f.scores.bias_S
    got = f(features, text)
    for p in range(3):
        for v in (0, 17):
            keys = torch.stack([key @ features[1, s, :, v] for s in range(3)])
            weights = (keys @ query(text[p]) / 6**0.5 + bias).softmax(0)
            torch.testing.assert_close(got[1, p, :, v], weights @ features[1, :, :, v], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", HEAD_STRINGS)
@pytest.mark.parametrize("fusion", FUSION_STRINGS)
def test_tiles_change_neither_logits_nor_gradients(fusion: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f, h, (features, text, bottleneck) = parts(fusion, head)
    results = []
    for numbers in (10**9, 200):  # one tile, then tiles of eight voxels
        monkeypatch.setattr(module, "_TILE_ELEMENTS", numbers)
        x = features.clone().requires_grad_()
        logits = predict_in_tiles(f, h, x, text, bottleneck)
        logits.square().sum().backward()
        results.append((logits.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_plain_forward_is_traced_without_a_break(autocast: bool) -> None:
    f, h, given = parts("uniform", "mask_embedding")

    @torch.compile(fullgraph=True, backend="eager")
    def traced(*given: torch.Tensor) -> torch.Tensor:
        return predict(f, h, *given)

    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, expected = traced(*given), predict(f, h, *given)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
