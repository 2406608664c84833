"""Parts inside parts, and module objects in the place of a spec."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from mome.cards import card
from mome.configuration import MoMEConfig
from mome.errors import InputError
from mome.module_objects import recall, remember
from mome.registry import ENCODERS, LAYERS, LOSSES, REGISTRIES, Registry, module, part
from mome.spec import dump


class Wrapper:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        layer: Any = part("layers", "moe(experts=swiglu(n=4))")
        rank: int = 4

    def __init__(self, config: Any) -> None:
        self.config = config


class Whole:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        model: Any = module()
        scale: float = 1.0

    def __init__(self, config: Any) -> None:
        self.model, self.scale = recall(config.model, "expert"), config.scale


@pytest.fixture
def wrappers(monkeypatch: pytest.MonkeyPatch) -> Registry:
    registry = Registry("wrapper", "mome.layers", "mome.none")
    registry.register("wrapper", Wrapper)
    registry.register("whole", Whole)
    monkeypatch.setitem(REGISTRIES, "wrappers", registry)
    return registry


def test_nested_specs_are_defaulted_printed_and_round_tripped(wrappers: Registry) -> None:
    text = "wrapper(layer=moe(experts=swiglu(n=2, hidden=8), router=topk(k=1)), rank=2)"
    full = wrappers.canonical(text)
    assert full["layer"]["experts"]["activation"] == "silu" and full["layer"]["router"]["normalize"] is True
    assert json.loads(json.dumps(full)) == full and wrappers.canonical(full) == full
    assert dump(full, wrappers) == text
    shuffled = json.loads(json.dumps(full, sort_keys=True))
    assert wrappers.canonical(shuffled) == full and dump(wrappers.canonical(shuffled), wrappers) == text


def test_defaults_of_nested_specs_are_left_out(wrappers: Registry) -> None:
    assert dump(wrappers.canonical("wrapper"), wrappers) == "wrapper"
    assert dump(wrappers.canonical("wrapper(layer=moe(experts=swiglu(n=4)))"), wrappers) == "wrapper"
    assert wrappers.canonical("wrapper")["layer"]["experts"]["n"] == 4
    nested = dump(wrappers.canonical("wrapper(layer=moe(experts=swiglu(n=5)))"), wrappers)
    assert nested == "wrapper(layer=moe(experts=swiglu(n=5)))"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wrapper(layer=moe(experts=swigu))", "unknown expert 'swigu', did you mean 'swiglu'"),
        ("wrapper(layer=moe(experts=swiglu(hiden=3)))", "no argument 'hiden', did you mean 'hidden'"),
        ("wrapper(layer=moe(experts=topk))", "'topk' is registered as a router, not as an expert"),
        ("wrapper(layer=moe(experts=swiglu(n='two')))", "argument 'n' is int, got 'two'"),
        ("wrapper(layer=3)", "a part is named by a string or a dict with a name"),
    ],
)
def test_what_is_wrong_inside_is_said(wrappers: Registry, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        wrappers.canonical(text)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_list_of_parts_is_checked_defaulted_and_round_tripped() -> None:
    text = "weighted_sum(losses=[tversky, focal(gamma=1.0)], weights=[1.0, 0.5])"
    full = LOSSES.canonical(text)
    assert full["losses"][0]["alpha"] == 0.3 and full["losses"][1] == LOSSES.canonical("focal(gamma=1.0)")
    assert json.loads(json.dumps(full)) == full and LOSSES.canonical(full) == full and dump(full, LOSSES) == text
    mixed = {**full, "losses": ["tversky", {"name": "focal", "gamma": 1.0}]}
    assert LOSSES.canonical(mixed) == full and len(LOSSES.build(mixed).losses) == 2
    assert dump(LOSSES.canonical("deep_supervision(loss=weighted_sum(losses=[bce_dice]))"), LOSSES) == (
        "deep_supervision(loss=weighted_sum(losses=[bce_dice]))"
    )
    for wrong, words in (
        ("focl", "unknown loss 'focl', did you mean 'focal'"),
        ("focal(gama=1.0)", "no argument 'gama', did you mean 'gamma'"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            MoMEConfig(loss=f"weighted_sum(losses=[tversky, {wrong}])", labels=["liver"])
        assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(InputError, match="named by a string or a dict"):
        ENCODERS.canonical({"name": "unet", "layer": ["moe", "moe"]})
    argument = card("loss", "weighted_sum").arguments[0]
    assert (argument.type, argument.default) == ("a list of specs of losses", "[]")


def test_config_objects_stand_inside_config_objects() -> None:
    from mome.encoders.unet import UNet
    from mome.experts.mlp import SwiGLUExperts
    from mome.layers.moe import MixtureOfExperts
    from mome.losses.focal import FocalLoss
    from mome.losses.weighted_sum import WeightedSum

    layer = MixtureOfExperts.Config(experts=SwiGLUExperts.Config(n=2))
    assert LAYERS.canonical(layer) == LAYERS.canonical("moe(experts=swiglu(n=2))")
    assert ENCODERS.canonical(UNet.Config(layer=layer)) == ENCODERS.canonical("unet(layer=moe(experts=swiglu(n=2)))")
    assert LAYERS.build(layer, dim=4).experts.num_experts == 2
    losses = WeightedSum.Config(losses=("tversky", FocalLoss.Config(gamma=1.0)))
    assert LOSSES.canonical(losses) == LOSSES.canonical("weighted_sum(losses=[tversky, focal(gamma=1.0)])")


def test_a_nested_layer_builds() -> None:
    layer = LAYERS.build("moe(experts=mlp(n=2, hidden=3), router=topk(k=1))", dim=4)
    assert layer.experts.num_experts == 2 and layer.router.k == 1


def test_a_module_object_is_remembered_by_name_and_hash(wrappers: Registry) -> None:
    network = nn.Linear(2, 3)
    spec = wrappers.canonical({"name": "whole", "model": network, "scale": 2})
    assert spec["model"]["class"] == "Linear" and len(spec["model"]["sha256"]) == 16
    assert json.loads(json.dumps(spec)) == spec
    assert wrappers.build(spec).model is network and wrappers.build(json.loads(json.dumps(spec))).scale == 2.0
    other = nn.Linear(2, 3)
    assert remember(other) != spec["model"]
    other.load_state_dict(network.state_dict())
    assert remember(other) == spec["model"]


def test_a_forgotten_module_object_is_asked_for(wrappers: Registry) -> None:
    reference = {"name": "object", "class": "SegResNet", "sha256": "0" * 16}
    with pytest.raises(InputError, match="module object of class 'SegResNet'") as caught:
        wrappers.build({"name": "whole", "model": reference})
    assert "pass the same object again" in str(caught.value)


def test_initialisers_leave_an_object_alone() -> None:
    from transformers import initialization as init

    network = nn.Linear(2, 3)
    before = network.weight.detach().clone()
    recall(remember(network), "expert")
    with torch.no_grad():
        init.zeros_(network.weight)
    assert torch.equal(network.weight, before)


def test_the_name_object_is_reserved(wrappers: Registry) -> None:
    with pytest.raises(InputError, match="reserved"):
        wrappers.register("object", Wrapper)


def test_a_nested_string_that_cannot_be_read_is_told_in_three_lines() -> None:
    with pytest.raises(InputError, match="never closed") as caught:
        ENCODERS.canonical({"name": "unet", "layer": "swiglu(n="})
    told = str(caught.value).splitlines()
    assert len(told) <= 3 and "swiglu(n=" in told[0] and "argument 'layer' of encoder 'unet'" in told[1]
