"""The contract of routers: what they observe, what they weigh, and what they may read."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import throwaway_parts
import torch
from small_models import small, volume

from mome.errors import InputError
from mome.map_context import MapContext
from mome.registry import LAYERS, ROUTERS
from mome.routers.base import Router
from mome.routers.routing import TokenChoice, count_assignments


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    throwaway_parts.register(monkeypatch)


class Counting(Router):
    """Sends every voxel to expert 0 and counts what it observes."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        pass

    def __init__(self, config, *, dim, num_experts):
        super().__init__()
        self.num_experts, self.seen = num_experts, 0
        self.gate = torch.nn.Linear(dim, 1)

    def forward(self, x_BDHWC, context):
        weights_TK = self.gate(x_BDHWC.float()).flatten(0, 3).sigmoid()
        ids_TK = torch.zeros(weights_TK.shape, dtype=torch.int64)
        return TokenChoice(count_assignments(ids_TK, self.num_experts), ids_TK=ids_TK, weights_TK=weights_TK)

    def observe(self, routing):
        self.seen += int(routing.counts_E.sum())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_router_observes_every_routing_once(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ROUTERS.names()
    monkeypatch.setattr(ROUTERS, "_entries", dict(ROUTERS._entries))
    ROUTERS.register("counting", Counting)
    model = small(experts="mlp(n=2, hidden=8)", router="counting").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(volume(), torch.ones(2, 12)).logits.sum().backward()
    routers = [module for module in model.modules() if isinstance(module, Counting)]
    assert [router.seen for router in routers] == [8**3, 16**3]
    model.eval()(volume(), torch.ones(2, 12))
    assert [router.seen for router in routers] == [8**3, 16**3]


def test_the_load_is_not_doubled_by_checkpointing(parts: None) -> None:
    model = small(experts="mlp(n=2, hidden=8)", router="place").train()
    model.gradient_checkpointing_enable()
    model(volume(), torch.ones(2, 12)).logits.sum().backward()
    loads = [module.load_E.sum() for module in model.modules() if isinstance(module, throwaway_parts.PlaceRouter)]
    assert loads == [8**3, 16**3]


def test_assignments_run_under_autocast_on_a_float32_map(parts: None) -> None:
    layer = LAYERS.build("moe(experts=mlp(n=2, hidden=8), router=own_choice)", dim=4)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    with torch.autocast("cpu", torch.bfloat16):
        result, _ = layer(torch.randn(1, 2, 2, 2, 4), MapContext())
    assert result.dtype == torch.float32 and torch.isfinite(result).all()


def test_every_router_weighs_the_same_in_the_auxiliary_loss(parts: None) -> None:
    """Prompt experts have a routing for every prompt; the router inside the encoder keeps its share."""
    model = small(encoder="flat", experts="own_film", router="topk(k=1)").train()
    text = torch.ones(4, 12)
    one, four = model(volume(), text[:1]), model(volume(), text)
    torch.testing.assert_close(one.aux_loss, four.aux_loss)
    torch.testing.assert_close(one.aux_losses["load_balance"], four.aux_losses["load_balance"])


def test_a_router_that_reads_prompts(parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the text's width, runs once for each prompt, and is refused inside an encoder."""

    class PromptRouter(Router):
        reads_prompts = True

        @dataclass(frozen=True, kw_only=True)
        class Config:
            pass

        def __init__(self, config, *, dim, num_experts, text_dim):
            super().__init__()
            self.num_experts, self.score = num_experts, torch.nn.Linear(text_dim, num_experts)

        def forward(self, x_BDHWC, context):
            weights_BE = self.score(context.text_BT.float()).softmax(-1)
            weights_TK, ids_TK = weights_BE.topk(1)
            voxels = x_BDHWC[0, ..., 0].numel()
            ids_TK, weights_TK = ids_TK.repeat_interleave(voxels, 0), weights_TK.repeat_interleave(voxels, 0)
            return TokenChoice(count_assignments(ids_TK, self.num_experts), ids_TK=ids_TK, weights_TK=weights_TK)

    ROUTERS.register("prompted", PromptRouter)
    model, text = small(experts="mlp(n=3, hidden=8)", router="prompted"), torch.randn(3, 12)
    with torch.no_grad():
        together = model(volume(), text).logits
        for p in range(3):
            torch.testing.assert_close(model(volume(), text[p : p + 1]).logits[:, 0], together[:, p])
    with pytest.raises(InputError, match="router 'prompted' reads the prompt, which is not known here"):
        small(encoder="flat(layers=moe(experts=mlp(n=2), router=prompted))")
