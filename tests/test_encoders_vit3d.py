"""`vit3d`: rotary positions, shapes at any number of tokens, and the promises of every encoder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from small_models import small
from torch.nn import functional as F

from mome import MoME
from mome.encoders.vit3d import ViT3D
from mome.errors import InputError
from mome.layers import attention
from mome.layers.rotary import rotary_angles, rotate
from mome.registry import ENCODERS

TINY = "vit3d(width=24, depth=2, heads=2, patch=[4, 4, 2], registers=2, decoder_channels=4)"
SPARSE = TINY.replace(", decoder", ", feed_forward=moe(experts=swiglu(n=3, hidden=8), router=topk(k=2)), decoder")


def encoder(spec: str = TINY) -> ViT3D:
    torch.manual_seed(0)
    return small(encoder=spec).encoder


def test_attention_depends_on_offsets_only() -> None:
    """Equal vectors everywhere: the score of two tokens is that of any two tokens with the same offset."""
    torch.manual_seed(0)
    sides, head_dim = (3, 4, 5), 18
    angles = rotary_angles(sides, head_dim, 100.0)
    q, k = torch.randn(2, head_dim, dtype=torch.float64).float()
    tokens = math.prod(sides)
    turned_q, turned_k = (rotate(x.expand(1, 1, tokens, head_dim), angles)[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    places = torch.stack(torch.meshgrid(*map(torch.arange, sides), indexing="ij"), -1).flatten(0, 2)
    by_offset: dict[tuple[int, ...], list[float]] = {}
    for i in range(tokens):
        for j in range(tokens):
            by_offset.setdefault(tuple((places[j] - places[i]).tolist()), []).append(scores[i, j].item())
    spread = max(max(values) - min(values) for values in by_offset.values())
    assert spread < 1e-4 and by_offset[(0, 0, 0)][0] == pytest.approx((q @ k).item(), abs=1e-4)
    assert scores.std() > 0.1  # and the offset matters
    means = {offset: sum(values) / len(values) for offset, values in by_offset.items()}
    for axis in range(3):  # along every axis
        one = tuple(int(a == axis) for a in range(3))
        assert abs(means[one] - means[(0, 0, 0)]) > 1e-3


def test_the_angles_are_those_of_the_formula() -> None:
    sides, head_dim, base = (2, 3, 4), 12, 50.0
    angles = rotary_angles(sides, head_dim, base)
    x = torch.randn(1, 1, 24, head_dim)
    got = rotate(x, angles)
    for token, (d, h, w) in enumerate((d, h, w) for d in range(2) for h in range(3) for w in range(4)):
        want = []
        for axis, (at, side) in enumerate(zip((d, h, w), sides, strict=True)):
            for pair in range(2):
                angle = (at - (side - 1) / 2) / base ** (pair / 2)
                a, b = x[0, 0, token, 4 * axis + 2 * pair : 4 * axis + 2 * pair + 2].tolist()
                want += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
        torch.testing.assert_close(got[0, 0, token], torch.tensor(want))


def test_attention_is_the_literal_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = attention.RotaryAttention(12, 2)
    angles = rotary_angles((1, 2, 2), 6, 100.0)
    x = torch.randn(1, 5, 12)  # one register, four tokens
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", lambda *a: calls.append(1) or fused(*a))
    got = layer(x, angles)
    heads = []
    for head in range(2):
        q, k, v = (
            x[0] @ layer.qkv.weight[12 * i + 6 * head : 12 * i + 6 * head + 6].T
            + layer.qkv.bias[12 * i + 6 * head : 12 * i + 6 * head + 6]
            for i in range(3)
        )
        q, k = (torch.cat([t[:1], rotate(t[None, None, 1:], angles)[0, 0]]) for t in (q, k))
        heads.append((q @ k.T / 6**0.5).softmax(-1) @ v)
    torch.testing.assert_close(got[0], layer.out(torch.cat(heads, dim=-1)))
    assert calls == [1]


@pytest.mark.parametrize("sides", [(4, 4, 2), (12, 20, 6), (4, 28, 10)])
def test_any_number_of_tokens(sides: tuple[int, int, int]) -> None:
    model = encoder()
    with torch.no_grad():
        pyramid = model(torch.rand(2, 1, *sides))
    assert model.strides == ((2, 2, 2), (1, 1, 1)) and model.channels == (8, 4) and model.size_divisor == (4, 4, 2)
    assert pyramid.bottleneck.shape[1:] == (24, sides[0] // 4, sides[1] // 4, sides[2] // 2)
    for map_BCDHW, channels, stride in zip(pyramid.maps, model.channels, model.strides, strict=True):
        assert map_BCDHW.shape == (2, channels, *(n // s for n, s in zip(sides, stride, strict=True)))


@pytest.mark.parametrize(
    ("patch", "strides"),
    [
        ((8, 8, 8), [(4, 4, 4), (2, 2, 2), (1, 1, 1)]),
        ((2, 8, 4), [(2, 4, 4), (2, 2, 2), (1, 1, 1)]),
        ((1, 1, 2), [(1, 1, 1)]),
    ],
)
def test_the_decoder_refines_the_coarsest_axes_first(patch: tuple[int, ...], strides: list[object]) -> None:
    model = ENCODERS.build(f"vit3d(width=6, depth=1, heads=1, patch={list(patch)}, decoder_channels=2)", in_channels=1)
    assert list(model.strides) == strides and len(model.channels) == len(strides) and model.channels[-1] == 2


@pytest.mark.parametrize("form", ["mlp", "swiglu", "geglu"])
def test_the_dense_layers_have_the_forms_of_the_experts(form: str) -> None:
    layer = encoder(f"vit3d(width=12, depth=1, heads=1, patch=[4, 4, 4], mlp='{form}')").blocks[0].feed_forward
    x = torch.randn(3, 12)
    hidden = x @ layer.up.weight.T + (0 if layer.up.bias is None else layer.up.bias)
    activate = {"mlp": F.gelu, "swiglu": F.silu, "geglu": F.gelu}[form]
    if form != "mlp":
        half = hidden.shape[1] // 2
        hidden = activate(hidden[:, :half]) * hidden[:, half:]
        assert layer.up.bias is None and half == 32
    else:
        hidden = activate(hidden)
        assert hidden.shape[1] == 48
    torch.testing.assert_close(
        layer(x), hidden @ layer.down.weight.T + (0 if layer.down.bias is None else layer.down.bias)
    )


def run(spec: str, checkpointing: bool) -> tuple[MoME, torch.Tensor]:
    model = small(encoder=spec).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    given = torch.rand(1, 1, 12, 20, 6, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    output = model(given, rows, torch.ones(1, 2, 12, 20, 6))
    output.loss.backward()
    return model, output.logits


@pytest.mark.parametrize("spec", [TINY, SPARSE], ids=["dense", "sparse"])
def test_a_whole_model_trains_and_checkpointing_changes_nothing(spec: str) -> None:
    (plain, logits), (repeated, again) = run(spec, False), run(spec, True)
    torch.testing.assert_close(again, logits)
    for (name, p), q in zip(plain.named_parameters(), repeated.parameters(), strict=True):
        assert p.grad is not None and p.grad.abs().sum() > 0, name
        torch.testing.assert_close(q.grad, p.grad, msg=name)


def test_saved_and_loaded_logits_are_equal(tmp_path: Path) -> None:
    model, given, rows = small(encoder=SPARSE), torch.rand(1, 1, 4, 12, 2), torch.randn(2, 12)
    model.save_pretrained(tmp_path)
    again = MoME.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want = model(given, rows).logits
        assert torch.equal(model(given, rows).logits, want) and torch.equal(again(given, rows).logits, want)
    with torch.device("meta"):
        meta = MoME(model.config)
    assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("vit3d(width=28, heads=2)", "width / heads is a multiple of 6, got 28 / 2"),
        ("vit3d(width=25, heads=2)", "width / heads is a multiple of 6, got 25 / 2"),
        ("vit3d(patch=[6, 8, 8])", "three powers of two, of which one is above 1, got [6, 8, 8]"),
        ("vit3d(patch=[8, 8])", "three powers of two"),
        ("vit3d(patch=[1, 1, 1])", "three powers of two"),
        ("vit3d(depth=0)", "depth of vit3d is at least 1"),
        ("vit3d(mlp='swigl')", "no feed-forward layer 'swigl', did you mean 'swiglu'"),
        ("vit3d(registers=-1)", "registers of vit3d is at least 0"),
    ],
)
def test_impossible_arguments_are_refused(spec: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        ENCODERS.build(spec, in_channels=1)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_a_patch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match=r"patch_size \[16, 16, 15\] does not fit encoder 'vit3d'"):
        small(encoder=TINY, patch_size=[16, 16, 15])
