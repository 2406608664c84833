"""The starts of the text-guided fusion that the neck study compares."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import initialization as init

from mome.routers.fusion.base import Fusion
from mome.training.config import TrainConfig
from mome.training.optimizer import build_optimizer, set_learning_rate

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
P, S, C, T, V = 3, 4, 8, 16, 20


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch):
    """Builds a fusion by its start, filled as a new model fills it, with maps and text rows."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    part = importlib.import_module("neck_fusions").StartedFusion

    def build(**settings: object) -> tuple[Fusion, torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        fusion = part(part.Config(**settings), channels=C, text_dim=T, scales=S)
        fusion.scores.init_weights_(init, 0.02)
        return fusion, torch.randn(2, S, C, V), torch.randn(P, T)

    return build


def test_the_uniform_start_weighs_scales_alike_and_the_text_gets_a_gradient(started) -> None:
    fusion, features, text = started(start="uniform")
    weights = fusion.weights(features, text)
    assert torch.equal(weights, torch.full_like(weights, 1 / S))
    fusion(features, text).square().sum().backward()
    assert fusion.scores.query.weight.grad.abs().min() > 0
    assert not fusion.scores.key.weight_DC.grad.any()  # the keys wait until the queries are not zero


def test_the_common_start_weighs_by_voxel_and_alike_for_all_prompts(started) -> None:
    fusion, features, text = started(start="common")
    weights = fusion.weights(features, text)
    assert torch.equal(weights[:, :1].expand_as(weights), weights)
    assert weights.std(dim=2).mean() > 0.05
    fusion(features, text).square().sum().backward()
    assert fusion.scores.query.weight.grad.abs().min() > 0 and fusion.scores.key.weight_DC.grad.any()


def test_the_projection_of_the_text_gets_a_lower_learning_rate(started) -> None:
    for slow in (False, True):
        model = nn.Module()
        model.fusion, model.head = started(start="random", slow=slow)[0], nn.Linear(2, 2)
        optimizer = build_optimizer(model, TrainConfig(weight_decay=0.1))
        set_learning_rate(optimizer, 0.4)
        groups = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        assert set(groups) == set(model.parameters())
        query = model.fusion.scores.query.weight
        assert groups.pop(query) == pytest.approx((0.1 if slow else 0.4, 0.1))
        assert {rate for rate, _ in groups.values()} == {0.4}


def test_an_unknown_start_is_refused(started) -> None:
    with pytest.raises(ValueError, match="not zero"):
        started(start="zero")
