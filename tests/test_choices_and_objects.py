"""Choices that a saved model keeps, module objects, and parts that are defined again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import accelerate
import pytest
import throwaway_parts
import torch
from small_models import small

from mome import MoME, MoMEConfig, create_model
from mome.errors import InputError
from mome.experts.constant import ConstantExperts
from mome.registry import EXPERTS, ROUTERS


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    throwaway_parts.register(monkeypatch)


def test_a_class_that_is_defined_again_replaces_the_earlier_one(parts: None) -> None:
    def define():
        class Again(throwaway_parts.ConvExperts):
            @dataclass(frozen=True, kw_only=True)
            class Config:
                n: int = 2

        return Again

    first, second = define(), define()
    EXPERTS.register("again", first)
    EXPERTS.register("again", second)
    assert EXPERTS.resolve("again")[0] is second
    with pytest.raises(InputError, match="two packages register the expert 'again'"):
        EXPERTS.register("again", throwaway_parts.ConvExperts)


def test_fingerprints_of_offloaded_models_differ() -> None:
    from mome.inference.fingerprint import model_fingerprint

    models = [small(), small()]
    with torch.no_grad():
        models[1].head.controller.weight.add_(1.0)
    whole = [model_fingerprint(model) for model in models]
    assert [model_fingerprint(accelerate.cpu_offload(model)) for model in models] == whole and whole[0] != whole[1]
    with torch.device("meta"):
        empty = small()
    with pytest.raises(InputError, match="built on the meta device"):
        model_fingerprint(empty)


def test_residual_follows_the_experts_unless_it_is_given() -> None:
    assert MoMEConfig(labels=["liver"], experts="linear").residual is False
    assert MoMEConfig(labels=["liver"], experts="swiglu(n=2)").residual is True
    assert MoMEConfig(labels=["liver"], experts="linear", residual=True).residual is True
    with pytest.raises(InputError, match="residual is true, false or None"):
        MoMEConfig(labels=["liver"], residual="yes")


def test_other_experts_of_a_saved_model_bring_their_residual(tmp_path: Path) -> None:
    small(experts="linear").save_pretrained(tmp_path)
    assert MoME.from_pretrained(tmp_path).config.residual is False
    assert MoME.from_pretrained(tmp_path, experts="mlp(n=2, hidden=8)").config.residual is True


def test_a_model_of_the_first_layout_is_refused(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "spec_version": 1}))
    with pytest.raises(InputError, match="saved with spec version 1, whose tensors have other names"):
        MoME.from_pretrained(tmp_path)


def test_a_residual_that_was_chosen_stays(tmp_path: Path) -> None:
    small(experts="mlp(n=2, hidden=8)", residual=False).save_pretrained(tmp_path)
    assert MoME.from_pretrained(tmp_path, experts="mlp(n=2, hidden=8)").config.residual is False
    assert MoME.from_pretrained(tmp_path, experts="swiglu(n=2, hidden=8)").config.residual is False
    assert MoME.from_pretrained(tmp_path, residual=True).config.residual is True


def test_objects_without_values_are_refused() -> None:
    with torch.device("meta"), pytest.raises(InputError, match="no values"):
        MoMEConfig(labels=["liver"], experts=throwaway_parts.OwnExperts(8))


def test_a_router_object_for_other_experts_is_refused() -> None:
    router = ROUTERS.build("topk(k=1)", dim=8, num_experts=2)
    with pytest.raises(InputError, match="routes to 2 experts, experts 'mlp' are 4"):
        small(experts="mlp(n=4, hidden=8)", router=router)


def test_new_weights_call_no_structure_trained(tmp_path: Path) -> None:
    small(trained_labels=["liver"]).save_pretrained(tmp_path)
    assert MoME.from_pretrained(tmp_path).config.trained_labels == ["liver"]
    assert MoME.from_pretrained(tmp_path, experts="mlp(n=2, hidden=8)").config.trained_labels == []


@pytest.mark.parametrize("centre", [torch.ones(5, 1), torch.ones(5), torch.ones(5, 7), torch.full((2, 12), torch.nan)])
def test_a_bank_is_set_whole_or_not_at_all(centre: torch.Tensor) -> None:
    model = small()
    with pytest.raises(InputError, match="centre_on has shape|not finite"):
        model.text_bank.set(torch.ones(3, 12), centre_on=centre)
    assert model.text_bank.is_empty


def test_a_part_that_gives_its_weights_no_values_is_refused() -> None:
    """They were whatever the memory held, and training then blamed the learning rate."""

    class Forgetful(ConstantExperts):
        def init_weights_(self, init: object, std: float) -> None:
            pass

    EXPERTS.register("forgetful", Forgetful)
    options = {"encoder": "unet(channels=[4, 8])", "labels": ["liver"], "text_encoder": "bank(width=6)", "dim": 4}
    with pytest.raises(InputError, match="Forgetful leaves its parameter 'blend_E2D' without values") as caught:
        create_model("mome_ct_tiny", experts="forgetful(n=2)", router="topk(k=1)", **options)
    assert "init_weights_" in str(caught.value) and len(str(caught.value).splitlines()) <= 3
    create_model("mome_ct_tiny", experts="constant(n=2)", router="topk(k=1)", **options)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_router_that_is_not_used_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """A comparison of routers compared one model with itself."""
    options = {"encoder": "unet(channels=[4, 8])", "labels": ["liver"], "text_encoder": "bank(width=6)", "dim": 4}
    create_model("mome_ct_tiny", experts="linear", **options)
    create_model("mome_ct_tiny", experts="linear(n=2)", router="switch", **options)
    assert "not used" not in caplog.text
    create_model("mome_ct_tiny", experts="linear", router="switch", **options)
    assert "the router is not used" in caplog.text
