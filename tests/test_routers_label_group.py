"""Experts by anatomy: which prompt goes where, that prompts do not change each other, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import throwaway_parts
import torch
from small_models import small, volume
from torch.nn import functional as F

from mome import MoME
from mome.errors import InputError
from mome.labels import load_table
from mome.labels.label import GROUPS
from mome.registry import ROUTERS
from mome.routers.routing import TokenChoice

ORGANS = ["liver", "stomach", "pancreas", "colon", "duodenum", "rectum"]
BONES = ["sacrum", "sternum", "hip_left", "hip_right", "skull", "mandible"]
TWO = "label_group(groups=[['digestive'], ['bones']])"


def model_of(router: str = TWO, labels: list[str] | None = None, experts: str = "mlp(n=2, hidden=8)") -> MoME:
    model = small(experts=experts, router=router, labels=labels or [*ORGANS, *BONES])
    rows = torch.randn(len(model.config.labels), 12, generator=torch.Generator().manual_seed(3))
    model.text_bank.set(rows, centre_on=rows)
    return model


def calls(model: MoME) -> list[int]:
    """Counts the passes of the experts of the finest scale; the list grows with every pass."""
    passes: list[int] = []
    model.scale_experts[-1].body.experts.register_forward_hook(lambda *_: passes.append(1))
    return passes


@torch.no_grad()
def logits(model: MoME, names: list[str]) -> torch.Tensor:
    return model(volume(batch=2), model.text_bank.rows(names)).logits


def test_every_label_has_a_group() -> None:
    assert {label.group for label in load_table()} == set(GROUPS) - {"other"}
    by_name = {label.name: label.group for label in load_table()}
    assert by_name["femur_left"] == "bones" and by_name["hepatic_vessel_tumor"] == "lesions"
    assert all(by_name[label.mirror] == label.group for label in load_table() if label.mirror)


def test_twelve_prompts_of_two_groups_cost_two_passes() -> None:
    model = model_of()
    passes = calls(model)
    mixed = [name for pair in zip(ORGANS, BONES, strict=True) for name in pair]
    together = logits(model, mixed)
    assert len(passes) == 2
    logits(model, ORGANS)
    assert len(passes) == 3
    assert together.shape == (2, 12, 16, 16, 16)


def test_more_prompts_never_change_a_logit() -> None:
    model = model_of()
    mixed = ["skull", "liver", "hip_left", "colon", "rectum"]
    together = logits(model, mixed)
    for p, name in enumerate(mixed):
        assert torch.equal(logits(model, [name])[:, 0], together[:, p]), name
    assert torch.equal(logits(model, ["colon", "skull", "liver"]), together[:, [3, 0, 1]])


def test_a_prompt_is_what_its_expert_alone_makes_of_it() -> None:
    model = model_of()
    features, rows = model.encode(volume(batch=2)), model.text_bank.rows(["pancreas", "sternum"])
    with torch.no_grad():
        for p, expert in enumerate((0, 1)):
            maps = []
            for scale, x in zip(model.scale_experts, features.expert_inputs, strict=True):
                ids = torch.full((x[..., 0].numel(), 1), expert)
                y = scale.body.experts(x.flatten(0, 3), ids, torch.ones(ids.shape)).view(x.shape)
                maps.append(scale.proj_out(y + x if scale.residual else y).movedim(-1, 1))
            maps[0] = F.interpolate(maps[0], size=maps[1].shape[2:], mode="trilinear")
            want = model._predict(torch.stack(maps, dim=1), model.text_bank(rows)[p : p + 1], features.bottleneck)
            torch.testing.assert_close(logits(model, ["pancreas", "sternum"])[:, p], want[:, 0])


def test_free_text_takes_the_group_of_the_nearest_label() -> None:
    model = model_of()
    seen: list[TokenChoice] = []
    model.scale_experts[0].body.router.register_forward_hook(lambda *given: seen.append(given[2]))
    noise = 0.1 * torch.randn(2, 12, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        model(volume(), model.text_bank.rows(["sacrum", "colon"]) + noise)
    assert [routing.ids_TK.unique().tolist() for routing in seen] == [[1], [0]]


def test_it_survives_saving_relabelling_and_new_rows(tmp_path: Path) -> None:
    model = model_of()
    first = logits(model, ["skull", "liver"])
    model.save_pretrained(tmp_path)
    again = MoME.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ["skull", "liver"]), first)
    again.relabel(["skull", "colon", "liver"])  # other numbers, the same names
    assert torch.equal(logits(again, ["skull", "liver"]), first)
    # The rows of skull and liver change places, and with them the groups of the texts.
    rows = again.text_bank.rows(["skull", "colon", "liver"])
    again.text_bank.set(rows[[2, 1, 0]])
    seen: list[TokenChoice] = []
    again.scale_experts[0].body.router.register_forward_hook(lambda *given: seen.append(given[2]))
    logits(again, ["skull", "liver"])
    assert [routing.ids_TK.unique().tolist() for routing in seen] == [[1], [0]]
    for half in (MoME.from_pretrained(tmp_path, dtype=torch.bfloat16).eval(), model_of().bfloat16(), model_of().half()):
        with torch.no_grad():
            given = half.text_bank.rows([*ORGANS, *BONES])
            assert half.text_bank.nearest(given).tolist() == list(range(12))
            assert half.text_bank.nearest(given.bfloat16()).tolist() == list(range(12))
            assert torch.isfinite(half(volume().bfloat16(), given[:2]).logits.float()).all()


def test_labels_without_a_row_are_never_the_nearest() -> None:
    model = model_of()
    rows = model.text_bank.rows_LT.clone()
    rows[3] = 0
    model.text_bank.set(rows)
    assert model.text_bank.nearest(torch.zeros(1, 12)).item() != 3


def test_only_the_experts_that_are_asked_learn() -> None:
    model = model_of().train()
    model.gradient_checkpointing_enable()
    output = model(volume(batch=2), model.text_bank.rows(["liver", "colon"]), torch.ones(2, 2, 16, 16, 16))
    output.loss.backward()
    for scale in model.scale_experts:
        grad = scale.body.experts.up_proj.grad
        assert grad[0].abs().sum() > 0 and grad[1].abs().sum() == 0


def test_an_empty_bank_is_said() -> None:
    model = small(experts="mlp(n=2, hidden=8)", router="label_group")
    with pytest.raises(InputError, match="looks for the labels of prompts among the text rows of the model") as caught:
        model(volume(), torch.ones(1, 12))
    assert "model.text_bank.set" in str(caught.value)


def test_groups_are_dealt_out_where_none_are_named() -> None:
    experts = [ROUTERS.build("label_group", dim=4, num_experts=n, text_dim=4).expert_of for n in (1, 3, len(GROUPS))]
    for n, expert_of in zip((1, 3, len(GROUPS)), experts, strict=True):
        assert list(expert_of) == list(GROUPS) and sorted(set(expert_of.values())) == list(range(n))
        assert list(expert_of.values()) == sorted(expert_of.values())


def test_own_labels_belong_to_other_or_to_where_they_are_named() -> None:
    labels = ["liver", "implant", "stent"]
    model = model_of("label_group(groups=[['digestive', 'stent'], ['other']])", labels)
    assert model.scale_experts[0].body.router._experts(labels) == [0, 1, 0]


REFUSED = [
    ("label_group(groups=[['bones']])", "has groups for 1 experts, and there are 2"),
    ("label_group(groups=[['bones'], []])", "expert 1 of router 'label_group' has no group"),
    ("label_group(groups=[['bones'], ['bones', 'heart']])", "gives 'bones' to expert 0 and to expert 1"),
    ("label_group(groups=[['bones'], ['heart']])", "the label 'liver' has no expert .* its group is 'digestive'"),
    ("label_group(groups=[['bone'], ['digestive']])", "'bone' in router 'label_group' is no group .*did you mean"),
]


@pytest.mark.parametrize(("router", "message"), REFUSED)
def test_what_cannot_be_is_refused_when_built(router: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(experts="mlp(n=2, hidden=8)", router=router, labels=["liver", "skull"])


def test_more_experts_than_groups_are_refused() -> None:
    with pytest.raises(InputError, match="expert 11 of router 'label_group' has no group"):
        small(experts="mlp(n=12, hidden=8)", router="label_group")


def test_a_label_without_an_expert_is_refused_by_relabel() -> None:
    model = model_of()
    before = list(model.config.labels)
    with pytest.raises(InputError, match="the label 'aorta' has no expert"):
        model.relabel(["liver", "aorta"])
    assert model.config.labels == before and model.text_bank.labels == before


def test_it_is_refused_inside_an_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    throwaway_parts.register(monkeypatch)
    with pytest.raises(InputError, match="router 'label_group' reads the prompt, which is not known here"):
        small(encoder="flat(layers=moe(experts=mlp(n=2), router=label_group))")
