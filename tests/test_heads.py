"""The head `mask_embedding` against a literal loop, over shared and own mixtures, and in tiles of voxels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mome.errors import InputError
from mome.layers import predict as module
from mome.layers.heads.base import Head
from mome.layers.predict import predict
from mome.registry import FUSIONS, HEADS

B, P, C, T, V = 2, 3, 4, 5, 30
SPECS = ["mask_embedding", "mask_embedding(hidden=7)", "mask_embedding(hidden=7, depth=1)"]


def build(spec: str) -> Head:
    torch.manual_seed(0)
    head = HEADS.build(spec, channels=C, text_dim=T, bottleneck_channels=6)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.6)
    return head


def given(prompts: int = P) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (B, prompts, C, V), (P, T), (B, 6, 2, 2, 2)
    mixture, text, bottleneck = (torch.randn(size, generator=generator) for size in sizes)
    return mixture, text, bottleneck


@pytest.mark.parametrize("prompts", [1, P], ids=["one mixture for all prompts", "a mixture for each"])
@pytest.mark.parametrize("spec", SPECS)
def test_the_logit_is_the_inner_product_of_embedding_and_voxel(spec: str, prompts: int) -> None:
    head, (mixture, text, bottleneck) = build(spec), given(prompts)
    with torch.no_grad():
        got = head(mixture, text, bottleneck)
        assert got.shape == (B, P, V)
        for p in range(P):
            embedding = text[p]
            for number, layer in enumerate(head.embed):
                if number:
                    embedding = torch.stack([value if value > 0 else torch.zeros(()) for value in embedding])
                embedding = layer.weight @ embedding + layer.bias
            for b in range(B):
                for v in (0, 11, V - 1):
                    product = sum(float(embedding[c] * mixture[b, p % prompts, c, v]) for c in range(C))
                    want = product / C**0.5 + float(head.bias)
                    assert abs(float(got[b, p, v]) - want) < 1e-4


def test_hidden_layers_are_those_that_are_asked_for() -> None:
    shapes = {spec: [tuple(layer.weight.shape) for layer in build(spec).embed] for spec in SPECS}
    assert shapes == {SPECS[0]: [(4, 5)], SPECS[1]: [(7, 5), (7, 7), (4, 7)], SPECS[2]: [(7, 5), (4, 7)]}


@pytest.mark.parametrize("fusion", ["text_guided(dim=6)", "gated(dim=6)", "uniform"])
def test_tiles_of_voxels_change_nothing(fusion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head, (_, text, bottleneck) = build(SPECS[1]), given()
    torch.manual_seed(3)
    first = FUSIONS.build(fusion, channels=C, text_dim=T, scales=2)
    for parameter in first.parameters():
        nn.init.normal_(parameter)
    features = torch.randn(B, 2, C, V)
    assert head.layers(text, bottleneck) is None  # it is no case of the fused op
    results = []
    for numbers in (10**9, B * P * C * 7):
        monkeypatch.setattr(module, "_TILE_ELEMENTS", numbers)
        x = features.clone().requires_grad_()
        head.zero_grad()
        logits = predict(first, head, x, text, bottleneck)
        logits.square().sum().backward()
        results.append([logits.detach(), x.grad, *(parameter.grad for parameter in head.parameters())])
    for whole, tiled in zip(*results, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mask_embedding(hidden=-1)", "hidden of head mask_embedding is at least 0, got -1"),
        ("mask_embedding(depth=0)", "depth of head mask_embedding is at least 1, got 0"),
        ("mask_embedding(prior=0.0)", "prior of the head lies between 0 and 1, got 0.0"),
    ],
)
def test_impossible_arguments_are_refused(spec: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build(spec)
