"""The experts that read maps and prompts (conv, film, cross_attention) against loops over voxels."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from expert_reference import DIM, SHAPE, TEXT_DIM, assert_gradients, build, map_inputs, slowly_too
from small_models import small, volume
from torch import Tensor

from mome.experts.base import Experts
from mome.map_context import MapContext

MAP_STRINGS = {"conv(n=3)": {}, "film(n=3)": {"text_dim": TEXT_DIM}}
MAP_STRINGS |= {"cross_attention(n=3, tokens=3, heads=2)": {"text_dim": TEXT_DIM}}
every_map_expert = pytest.mark.parametrize("spec", MAP_STRINGS)


def expert_of(spec: str) -> Experts:
    return build(spec, **MAP_STRINGS[spec])


def voxels() -> itertools.product:
    return itertools.product(*(range(side) for side in SHAPE[:4]))


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_conv_is_a_depthwise_and_a_pointwise_convolution(kernel: int) -> None:
    body = build(f"conv(n=2, kernel={kernel})")
    x, gates, context = map_inputs(2)
    got, half = body(x, gates, context), kernel // 2
    for b, *place in voxels():
        wanted = torch.zeros(DIM, dtype=torch.float64)
        for e, (depthwise, _, pointwise) in enumerate(body.layers):
            hidden = depthwise.bias.clone()
            for offset in itertools.product(range(kernel), repeat=3):
                near = [p + o - half for p, o in zip(place, offset, strict=True)]
                if all(0 <= at < side for at, side in zip(near, SHAPE[1:4], strict=True)):
                    hidden = hidden + depthwise.weight[(slice(None), 0, *offset)] * x[(b, *near)]
            result = pointwise.weight[:, :, 0, 0, 0] @ torch.nn.functional.gelu(hidden) + pointwise.bias
            wanted = wanted + gates[(b, *place, e)] * result
        torch.testing.assert_close(got[(b, *place)], wanted)


def test_film_folded_equals_its_unfolded_form() -> None:
    body = expert_of("film(n=3)")
    x, gates, context = map_inputs(3)
    got = body(x, gates, context)
    for b, *place in voxels():
        numbers = body.modulation.weight @ context.text_BT[b] + body.modulation.bias
        gamma, beta = numbers.view(2, 3, DIM)
        wanted = torch.zeros(DIM, dtype=torch.float64)
        for e in range(3):
            linear = body.weight_EDD[e] @ x[(b, *place)] + body.bias_ED[e]
            wanted = wanted + gates[(b, *place, e)] * ((1 + gamma[e]) * linear + beta[e])
        torch.testing.assert_close(got[(b, *place)], wanted)


@pytest.mark.parametrize("width", [16, 2048])
def test_film_starts_near_the_linear_layer_whatever_the_width_of_text(width: int) -> None:
    model = small(experts="film(n=4)", text_encoder=f"bank(width={width})", dim=32)
    rows_LT = torch.randn(3, width)
    model.text_bank.set(rows_LT, centre_on=rows_LT)
    body = model.scale_experts[0].body.experts
    scale_BED, shift_BED = body.scale_and_shift(model.text_bank())
    assert 0.05 < (scale_BED - 1).std() < 0.2 and 0.05 < shift_BED.std() < 0.2


def attended(body: Experts, e: int, x_D: Tensor, text_T: Tensor) -> Tensor:
    """One expert of `cross_attention(tokens=3, heads=2)` at one voxel, nothing folded."""
    tokens = (body.tokens.weight @ text_T + body.tokens.bias).view(3, DIM)
    tokens = torch.stack([(c - c.mean()) / (c.var(unbiased=False) + 1e-5).sqrt() for c in tokens])
    tokens = tokens * body.norm.weight + body.norm.bias
    query = body.query_EDD[e] @ x_D + body.query_bias_ED[e]
    heads = []
    for own in (slice(0, 2), slice(2, 4)):
        keys = [(body.key_EDD[e] @ c)[own] for c in tokens]
        scores = torch.stack([query[own] @ key for key in keys]) / 2**0.5
        shares = scores.exp() / scores.exp().sum()
        heads.append(sum(share * (body.value_EDD[e] @ c)[own] for share, c in zip(shares, tokens, strict=True)))
    return body.out_EDD[e] @ torch.cat(heads) + body.out_bias_ED[e]


def test_cross_attention_folded_equals_attention_voxel_by_voxel() -> None:
    body = expert_of("cross_attention(n=3, tokens=3, heads=2)")
    x, gates, context = map_inputs(3)
    got = body(x, gates, context)
    for b, *place in voxels():
        wanted = sum(gates[(b, *place, e)] * attended(body, e, x[(b, *place)], context.text_BT[b]) for e in range(3))
        torch.testing.assert_close(got[(b, *place)], wanted)


def test_the_attention_varies_over_voxels() -> None:
    """With one gate of one, voxels differ in the result by their attention alone: the values come from the prompt."""
    model = small(experts="cross_attention(n=1)")
    body, results = model.scale_experts[1].body.experts, []
    body.register_forward_hook(lambda module, given, result: results.append(result))
    with torch.no_grad():
        model(volume(), torch.randn(2, 12, generator=torch.Generator().manual_seed(1)))
    for result in results:
        spread = result.flatten(1, 3).std(dim=1) / result.abs().mean()
        assert spread.max() > 0.1
    assert not torch.allclose(results[0], results[1])  # and the two prompts have different results


@slowly_too
@every_map_expert
def test_gradients(spec: str, fast: bool) -> None:
    body = expert_of(spec)
    x, gates, context = map_inputs(3)

    def call(body: Experts, x: Tensor, gates: Tensor, text: Tensor) -> Tensor:
        return body(x, gates, replace(context, text_BT=text)) + 0 * text.sum()  # conv does not read the text

    assert_gradients(body, call, x[:, :1, :2, :1], gates[:, :1, :2, :1], context.text_BT, fast=fast)


@every_map_expert
def test_experts_without_a_gate_do_not_run_in_eval_and_change_nothing(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = expert_of(spec).eval()
    x, gates, context = map_inputs(3)
    gates[..., 1:] = 0
    gates[1, 0, 2, 1, 2] = -0.01  # one voxel, of one map, is enough for expert 2
    module = __import__(type(body).__module__, fromlist=["experts_to_run"])
    choose, ran = module.experts_to_run, []
    monkeypatch.setattr(module, "experts_to_run", lambda *given: ran.append(list(choose(*given))) or ran[-1])
    with torch.no_grad():
        skipped = body(x, gates, context)
        whole = body.train()(x, gates, context)
    body.eval()(x, gates, context)  # gradients are recorded here
    assert ran == [[0, 2], [0, 1, 2], [0, 1, 2]]
    assert torch.equal(skipped, whole)
    with torch.no_grad():
        assert not body(x, torch.zeros_like(gates), context).any()


@every_map_expert
def test_bfloat16_is_close_and_keeps_its_type(spec: str) -> None:
    body = expert_of(spec).bfloat16()
    x, gates, context = map_inputs(3)
    x, context = x.bfloat16(), MapContext(text_BT=context.text_BT.bfloat16())
    got = body(x, gates.float(), context)
    assert got.dtype == torch.bfloat16
    wanted = body.double()(x.double(), gates, MapContext(text_BT=context.text_BT.double()))
    torch.testing.assert_close(got.double(), wanted, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(("spec", "child"), [("film(n=2)", "modulation"), ("cross_attention(n=2)", "tokens")])
def test_what_depends_on_the_prompt_is_folded_once_per_prompt(spec: str, child: str) -> None:
    model, calls = small(experts=spec, router="topk(k=1)"), []
    getattr(model.scale_experts[1].body.experts, child).register_forward_hook(lambda *given: calls.append(given))
    with torch.no_grad():
        model(volume(), torch.randn(3, 12))
    assert len(calls) == 3
