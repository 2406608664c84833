"""The always-on part beside routed experts: once per voxel with every form of routing, and as in its owners' code."""

from __future__ import annotations

import pytest
import throwaway_parts
import torch
import transformers
from expert_reference import DIM, SHAPE, TOKENS, build, one_expert
from torch import Tensor
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from mome.layers.dispatcher import LocalDispatcher
from mome.map_context import MapContext
from mome.registry import EXPERTS, LAYERS, ROUTERS
from mome.routers.routing import Assignments, Routing, TokenChoice, count_assignments

SHARED = "shared(routed=swiglu(n=3, hidden=5), shared=mlp(hidden=3))"


def token_choice() -> Routing:
    ids = torch.randint(2, (TOKENS, 2))  # expert 2 has no token
    return TokenChoice(count_assignments(ids, 3), ids_TK=ids, weights_TK=torch.rand(TOKENS, 2, dtype=torch.float64))


def few_assignments() -> Routing:
    """Five tokens have one expert, one of them two; eighteen tokens have none."""
    rows, experts = torch.tensor([3, 3, 7, 11, 20, 23]), torch.tensor([0, 2, 2, 2, 0, 0])
    weights = torch.randn(6, dtype=torch.float64)
    return Assignments(torch.tensor([3, 0, 3]), tokens_N=rows, experts_N=experts, weights_N=weights, tokens=TOKENS)


def slots() -> Routing:
    router = ROUTERS.build("slot", dim=DIM, num_experts=3)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router(torch.randn(SHAPE), MapContext())


@pytest.mark.parametrize("make", [token_choice, few_assignments, slots])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shared", ["mlp(hidden=3)", "linear"])
def test_every_voxel_gets_the_shared_part_once(make, gate: bool, shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    throwaway_parts.register(monkeypatch)
    body = build(f"shared(routed=swiglu(n=3, hidden=5), shared={shared}, gate={str(gate).lower()})")
    rows: list[int] = []
    body.shared.expert.register_forward_pre_hook(lambda module, given: rows.append(given[0].shape[0]))
    torch.manual_seed(5)
    x, routing = torch.randn(SHAPE, dtype=torch.float64), make()
    got = LocalDispatcher()(body, x, routing, MapContext())
    assert rows == [TOKENS]
    routed = LocalDispatcher()(body.routed, x, routing, MapContext())
    for x_D, y_D, routed_D in zip(*(m.reshape(TOKENS, DIM) for m in (x, got, routed)), strict=True):
        share = torch.sigmoid(body.shared.gate.weight[0] @ x_D) if gate else 1.0
        torch.testing.assert_close(y_D, routed_D + share * one_expert(body.shared.expert, 0, x_D))


def test_one_routed_expert_needs_no_router() -> None:
    layer = LAYERS.build("moe(experts=shared(routed=swiglu(n=1, hidden=5), shared=linear))", dim=DIM)
    layer.experts = build("shared(routed=swiglu(n=1, hidden=5), shared=linear)")
    x = torch.randn(SHAPE, dtype=torch.float64)
    y, routing = layer(x, MapContext())
    assert layer.router is None and routing is None
    part = layer.experts
    x_D, y_D = x.reshape(TOKENS, DIM)[7], y.reshape(TOKENS, DIM)[7]
    share = torch.sigmoid(part.shared.gate.weight[0] @ x_D)
    torch.testing.assert_close(y_D, one_expert(part.routed, 0, x_D) + share * one_expert(part.shared.expert, 0, x_D))


def test_gradients_reach_the_shared_part_and_equal_those_of_its_formula() -> None:
    body = build(SHARED)
    torch.manual_seed(6)
    x, routing = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True), few_assignments()

    def formula(x: Tensor) -> Tensor:
        flat = x.reshape(TOKENS, DIM)
        share = torch.sigmoid(flat @ body.shared.gate.weight.T)
        expert = body.shared.expert
        hidden = torch.nn.functional.gelu(flat @ expert.up_proj[0].T + expert.up_bias[0])
        shared = hidden @ expert.down_proj[0].T + expert.down_bias[0]
        return LocalDispatcher()(body.routed, x, routing, MapContext()) + (share * shared).view(x.shape)

    tensors = (x, *body.parameters())
    got = torch.autograd.grad(LocalDispatcher()(body, x, routing, MapContext()).square().sum(), tensors)
    wanted = torch.autograd.grad(formula(x).square().sum(), tensors)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_gated_sum_is_that_of_qwen2_moe() -> None:
    config = transformers.Qwen2MoeConfig(
        hidden_size=DIM,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        moe_intermediate_size=5,
        shared_expert_intermediate_size=6,
    )
    torch.manual_seed(0)
    block = Qwen2MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    layer = LAYERS.build(
        "moe(experts=shared(routed=swiglu(n=4, hidden=5), shared=swiglu(hidden=6)), router=topk(k=2))", dim=DIM
    )
    theirs, body = block.shared_expert, layer.experts
    with torch.no_grad():
        layer.router.weight_EC.copy_(block.gate.weight)
        body.routed.gate_up_proj.copy_(block.experts.gate_up_proj)
        body.routed.down_proj.copy_(block.experts.down_proj)
        body.shared.expert.gate_up_proj.copy_(torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight])[None])
        body.shared.expert.down_proj.copy_(theirs.down_proj.weight[None])
        body.shared.gate.weight.copy_(block.shared_expert_gate.weight)
        x = torch.randn(1, TOKENS, DIM)
        wanted = block(x)
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        got, _ = layer(x.view(1, 2, 3, 4, DIM), MapContext())
    torch.testing.assert_close(got.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)


def test_other_experts_have_no_always_on_part() -> None:
    assert all(EXPERTS.build(spec, dim=DIM).always_on is None for spec in ("linear", "adaptive", "lora", "conv"))
