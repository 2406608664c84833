"""Every loss against a literal formula, and the rule that what is not annotated has no gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mome import MoME
from mome.errors import InputError
from mome.losses.boundary import signed_distance
from mome.losses.row_sums import row_sums
from mome.registry import LOSSES
from mome.training.config_file import load_run_config

# The marginal loss moves what is not annotated by its design.
MASKED = [name for name in LOSSES.names() if name not in ("weighted_sum", "marginal")]
SUM = "weighted_sum(losses=[tversky, focal(gamma=1.0)], weights=[1.0, 0.5])"


def data(prompts: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, prompts, 4, 5, 6, generator=generator)
    targets = (torch.rand(2, prompts, 4, 5, 6, generator=generator) > 0.7).float()
    return logits, targets


@pytest.mark.parametrize("spec", [*MASKED, SUM])
def test_what_is_not_annotated_has_no_gradient(spec: str) -> None:
    logits, targets = data()
    logits.requires_grad_()
    supervised = torch.tensor([[True, False, True], [True, False, False]])
    loss = LOSSES.build(spec)
    value = loss(logits, targets, supervised)
    value.backward()
    assert torch.isfinite(logits.grad).all()
    for case, prompt in np.ndindex(2, 3):
        assert bool(logits.grad[case, prompt].any()) == bool(supervised[case, prompt])
    changed = torch.where(supervised[:, :, None, None, None], targets, 1 - targets)
    assert torch.equal(loss(logits, changed, supervised), value)
    assert loss(logits, targets, torch.zeros(2, 3, dtype=torch.bool)) == 0


@pytest.mark.parametrize("spec", [*MASKED, SUM, "marginal"])
def test_targets_and_logits_of_every_type_give_the_same(spec: str) -> None:
    logits, targets = data()
    loss = LOSSES.build(spec)
    wanted = loss(logits, targets)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64):
        torch.testing.assert_close(loss(logits, targets.to(dtype)), wanted)
    for dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(loss(logits.to(dtype), targets.to(dtype)), wanted, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("part", [1, 2**18])
def test_the_sums_of_rows_against_plain_operations(part: int, monkeypatch) -> None:
    """Values and gradients are those of autograd, for any size of the parts, and no other tensor is kept."""
    monkeypatch.setattr("mome.losses.row_sums._PART", part)
    logits = (10 * data()[0].double()).flatten(2).requires_grad_()
    targets = (data()[1] > 0.5).to(torch.uint8).flatten(2)
    probability, inside = logits.sigmoid(), targets.double()
    weight = torch.tensor(20.0, dtype=torch.float64)
    cross = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, inside, pos_weight=weight, reduction="none"
    ).sum(-1)
    wanted = (cross, (probability * inside).sum(-1), probability.sum(-1), inside.sum(-1))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = row_sums(logits, targets, 20.0)
    assert [tensor.data_ptr() for tensor in kept] == [logits.data_ptr(), targets.data_ptr()]
    torch.testing.assert_close(tuple(found), wanted)
    weights = torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = [
        torch.autograd.grad((torch.stack(sums[:3]) * weights).sum(), logits, retain_graph=True)[0]
        for sums in (found, wanted)
    ]
    torch.testing.assert_close(*gradients)
    extreme = torch.tensor([[[-1e4, -200.0, 200.0, 1e4]]], requires_grad=True)
    row_sums(extreme, torch.tensor([[[0, 1, 0, 1]]])).cross_entropy.sum().backward()
    assert torch.equal(extreme.grad, torch.tensor([[[0.0, -1.0, 1.0, 0.0]]]))


def test_the_cross_entropy_of_float32_logits_is_exact_up_to_rounding() -> None:
    logits = torch.linspace(-30, 30, 4001)
    inside = torch.arange(4001) % 2
    for voxel in range(0, 4001, 50):  # one at a time, so that large values hide no small one
        one = (slice(None), slice(None), slice(voxel, voxel + 2))
        x, t = logits[None, None][one], inside[None, None][one]
        wanted = torch.nn.functional.binary_cross_entropy_with_logits(x.double(), t.double(), reduction="sum")
        torch.testing.assert_close(row_sums(x, t).cross_entropy.double().sum(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "spec", ["bce_dice(positive_weight=-3)", "bce_dice(smooth=0)", "bce_dice(bce_weight=0, dice_weight=0)",
             "bce_dice(dice_weight=-1)", "weighted_sum(losses=[focal], weights=[-1])", "tversky(alpha=0, beta=0)",
             "weighted_sum(losses=[bce_dice, focal], weights=[0, 0])", "focal(alpha=0)", "focal(alpha=1)"],
)  # fmt: skip
def test_a_loss_that_would_train_the_wrong_thing_is_refused(spec: str) -> None:
    with pytest.raises(InputError, match=f"loss {spec.partition('(')[0]} has"):
        LOSSES.build(spec)


def test_focal_against_the_formula() -> None:
    logits, targets = data()
    p = logits.sigmoid().double()
    t = targets.double()
    wanted = -(0.25 * (1 - p) ** 2 * p.log() * t + 0.75 * p**2 * (1 - p).log() * (1 - t)).mean()
    torch.testing.assert_close(LOSSES.build("focal(gamma=2.0, alpha=0.25)")(logits, targets).double(), wanted)
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(LOSSES.build("focal(gamma=0.0)")(logits, targets), plain)


def test_tversky_against_the_formula_and_dice() -> None:
    logits, targets = data(1)
    p = logits.sigmoid()
    hit, false, missed = (p * targets).sum(), (p * (1 - targets)).sum(), ((1 - p) * targets).sum()
    wanted = 1 - (hit + 2) / (hit + 0.2 * false + 0.8 * missed + 2)
    loss = LOSSES.build("tversky(alpha=0.2, beta=0.8, smooth=2.0)")
    torch.testing.assert_close(loss(logits, targets), wanted)
    torch.testing.assert_close(
        LOSSES.build("tversky(alpha=0.2, beta=0.8, smooth=2.0, gamma=2.0)")(logits, targets), wanted**0.5
    )
    dice = LOSSES.build("bce_dice(bce_weight=0.0, smooth=2.0)")(logits, targets)
    torch.testing.assert_close(LOSSES.build("tversky(alpha=0.5, beta=0.5, smooth=1.0)")(logits, targets), dice)


def test_boundary_against_brute_force() -> None:
    logits, targets = data(1)
    targets[1] = 0  # no surface
    inside = targets[0, 0].numpy() > 0.5
    points = np.argwhere(np.ones_like(inside)) * (1.0, 2.0, 3.0)
    other = {flag: points[(inside == (not flag)).ravel()] for flag in (True, False)}
    distance = [
        np.linalg.norm(other[flag] - point, axis=1).min() * (-1 if flag else 1)
        for point, flag in zip(points, inside.ravel(), strict=True)
    ]
    np.testing.assert_allclose(signed_distance(inside, (1.0, 2.0, 3.0)).ravel(), distance, rtol=1e-6)
    wanted = (logits[0, 0].sigmoid().ravel() * torch.tensor(distance).float()).mean() / 2
    torch.testing.assert_close(LOSSES.build("boundary(spacing=[1.0, 2.0, 3.0])")(logits, targets), wanted)


def test_marginal_against_the_formula() -> None:
    """Case 0 annotates prompts 0 and 1, case 1 all; the merged class of case 0 is background and prompt 2."""
    logits, _ = data()
    targets = torch.nn.functional.one_hot(torch.randint(0, 4, (2, 4, 5, 6)), 4).movedim(-1, 1)[:, 1:].float()
    supervised = torch.tensor([[True, True, False], [True, True, True]])
    total, exclusion = 0.0, 0.0
    for case, z, y, x in np.ndindex(2, 4, 5, 6):
        p = torch.softmax(torch.cat([torch.zeros(1), logits[case, :, z, y, x]]).double(), 0)
        truth = targets[case, :, z, y, x]
        if case == 0:
            own = next((p[i + 1] for i in (0, 1) if truth[i]), p[0] + p[3])
            exclusion += float(p[3]) if truth[:2].any() else 0.0
        else:
            own = next((p[i + 1] for i in range(3) if truth[i]), p[0])
        total -= float(own.log())
    wanted = torch.tensor((total + 0.5 * exclusion) / (2 * 120))
    torch.testing.assert_close(LOSSES.build("marginal(exclusion=0.5)")(logits, targets, supervised), wanted.float())


def test_a_sum_weighs_its_terms_and_a_model_keeps_its_loss(tmp_path) -> None:
    logits, targets = data()
    wanted = LOSSES.build("tversky")(logits, targets) + 0.5 * LOSSES.build("focal(gamma=1.0)")(logits, targets)
    torch.testing.assert_close(LOSSES.build(SUM)(logits, targets), wanted)
    from tiny_parts import make_model

    model = make_model(loss=SUM)
    assert "loss" not in make_model().config.to_dict()
    volume, text = torch.rand(1, 1, 16, 16, 16), torch.randn(2, model.config.text_dim)
    mask = (torch.rand(1, 2, 16, 16, 16) > 0.5).float()
    result = model(volume, text, mask)
    torch.testing.assert_close(result.segmentation_loss, LOSSES.build(SUM)(result.logits, mask))
    model.save_pretrained(tmp_path)
    again = MoME.from_pretrained(tmp_path)
    assert again.config.loss == model.config.loss
    torch.testing.assert_close(again(volume, text, mask).loss, model.eval()(volume, text, mask).loss)


def test_deep_supervision_against_the_formula() -> None:
    """Three maps weigh 4 : 2 : 1; a coarse voxel is inside where at least half of its fine voxels are."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 2, side, side, 8, generator=generator, requires_grad=True) for side in (8, 4, 2)]
    targets = (torch.rand(2, 2, 8, 8, 8, generator=generator) > 0.5).to(torch.uint8)
    supervised = torch.tensor([[True, False], [True, True]])
    loss = LOSSES.build("deep_supervision(loss=tversky, decay=0.5, scales=2)")
    wanted = torch.zeros(())
    for weight, scale in zip((4, 2, 1), maps, strict=True):
        step = 8 // scale.shape[2]
        coarse = torch.zeros(scale.shape)
        for place in np.ndindex(*scale.shape):
            b, p, z, y, x = place
            block = targets[b, p, z * step : (z + 1) * step, y * step : (y + 1) * step, x]
            coarse[place] = float(block.float().mean() >= 0.5)
        wanted = wanted + weight / 7 * LOSSES.build("tversky")(scale, coarse, supervised)
    value = loss(maps, targets, supervised)
    torch.testing.assert_close(value, wanted)
    value.backward()
    for scale in maps:
        assert scale.grad is not None and not scale.grad[0, 1].any() and scale.grad[1, 1].any()
    fewer = LOSSES.build("deep_supervision(loss=tversky, decay=0.5, scales=1)")(maps, targets, supervised)
    torch.testing.assert_close(fewer, loss(maps[:2], targets, supervised))
    plain = LOSSES.build("tversky")(maps[0], targets, supervised)
    torch.testing.assert_close(loss(maps[0], targets, supervised), plain)


@pytest.mark.parametrize("experts", ["swiglu(n=4, hidden=8)", "film(n=4)"])
def test_a_model_gives_its_scales_to_deep_supervision(experts: str) -> None:
    """The logits of a coarse scale follow that scale's expert; they exist in training alone."""
    from tiny_parts import inputs, make_model, targets

    encoder = "unet(channels=[8, 8, 8, 16])"
    model = make_model(loss="deep_supervision(loss=bce_dice, scales=2)", experts=experts, encoder=encoder)
    given, masks = inputs(model), targets(model, 1)
    assert model(**given, targets=masks).scale_logits is None
    model.train()
    torch.manual_seed(0)
    result = model(**given, targets=masks)
    assert [tuple(scale.shape[2:]) for scale in result.scale_logits] == [(8, 8, 8), (4, 4, 4)]
    wanted = LOSSES.build("deep_supervision(loss=bce_dice, scales=2)")((result.logits, *result.scale_logits), masks)
    torch.testing.assert_close(result.segmentation_loss, wanted)
    assert result["loss"] is result.loss and result.compared[0] is result.logits
    coarsest = list(model.scale_experts[0].parameters())
    of_fine = torch.autograd.grad(result.scale_logits[0].sum(), coarsest, retain_graph=True, allow_unused=True)
    of_coarse = torch.autograd.grad(result.scale_logits[1].sum(), coarsest, allow_unused=True)
    assert not any(g is not None and g.any() for g in of_fine) and any(g is not None and g.any() for g in of_coarse)
    half = model.bfloat16()(**given, targets=masks)  # the CPU has no average pooling of bfloat16
    half.loss.backward()
    for rounded, scale in zip(half.scale_logits, result.scale_logits, strict=True):
        assert (rounded.float() - scale).abs().mean() < 0.1 * scale.abs().mean()  # a voxel may take another expert


def test_deep_supervision_needs_several_scales_and_stands_once() -> None:
    from tiny_parts import make_model

    with pytest.raises(InputError, match="compares several scales, and encoder 'unet' with fusion 'last' gives one"):
        make_model(loss="deep_supervision", fusion="last")
    with pytest.raises(InputError, match="stands around a weighted_sum"):
        LOSSES.build("weighted_sum(losses=[tversky, deep_supervision])")
    with pytest.raises(InputError, match="stands once"):
        LOSSES.build("deep_supervision(loss=deep_supervision)")
    with pytest.raises(InputError, match="a decay above 0"):
        LOSSES.build("deep_supervision(decay=0.0)")


@pytest.mark.parametrize(
    "spec",
    ["focal(gamma=-1.0)", "focal(alpha=2.0)", "tversky(gamma=0.5)", "weighted_sum", "marginal(exclusion=-1.0)", "dise"],
)
def test_bad_settings_are_refused(spec: str) -> None:
    with pytest.raises(InputError):
        LOSSES.build(spec)


def test_the_list_of_losses_is_in_the_run_configuration(tmp_path) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"labels: [liver]\nloss: '{SUM}'\n")
    assert LOSSES.build(load_run_config(recipe, []).loss)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_focal_loss_has_a_slope_at_large_logits(gamma: float) -> None:
    """With γ below 1 the power's slope is infinite at p = 0, which made the gradient NaN."""
    logits = torch.tensor([-300.0, 300.0, -1.0, 1.0]).expand(1, 2, 4).clone().requires_grad_()
    targets = torch.tensor([[[0.0, 1.0, 1.0, 0.0]] * 2])
    loss = LOSSES.build(f"focal(gamma={gamma})")(logits[..., None, None], targets[..., None, None])
    loss.backward()
    assert torch.isfinite(logits.grad).all() and bool((logits.grad[..., 2:] != 0).all())
    p_V = torch.sigmoid(torch.tensor([-1.0, -1.0]))  # of the right side, at the last two voxels
    expected = (-((1 - p_V) ** gamma) * p_V.log()).sum() / 4
    torch.testing.assert_close(loss.detach(), expected)


def test_the_sum_of_targets_asks_for_no_gradient() -> None:
    sums = row_sums(torch.zeros(1, 1, 8, requires_grad=True), torch.ones(1, 1, 8))
    assert not sums.target.requires_grad and sums.both.requires_grad
