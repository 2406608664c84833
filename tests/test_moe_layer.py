"""The mixture layer: every form of routing against a loop over tokens and experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mome.layers.dispatcher import LocalDispatcher
from mome.map_context import MapContext
from mome.registry import EXPERTS
from mome.routers.groups import Groups
from mome.routers.routing import Assignments, Routing, Slots, TokenChoice, count_assignments

EXPERT_STRINGS = ["linear(n=3)", "mlp(n=3, hidden=5)", "swiglu(n=3, hidden=5, bias=True)", "geglu(n=3, hidden=5)"]
SHAPE = (2, 2, 3, 2, 4)
TOKENS = 24


def experts(spec: str) -> nn.Module:
    torch.manual_seed(0)
    body = EXPERTS.build(spec, dim=4).double()
    for parameter in body.parameters():
        nn.init.normal_(parameter, std=0.5)
    return body


def one_expert(body: nn.Module, e: int, x_C: Tensor) -> Tensor:
    """The result of one expert for one token, through Hugging Face's signature."""
    return body(x_C[None], torch.tensor([[e]]), torch.ones(1, 1, dtype=torch.float64))[0]


def token_choice() -> TokenChoice:
    ids = torch.stack([torch.randperm(3)[:2] for _ in range(TOKENS)])
    return TokenChoice(count_assignments(ids, 3), ids_TK=ids, weights_TK=torch.rand(TOKENS, 2, dtype=torch.float64))


def assignments() -> Assignments:
    """Expert 0 has five tokens, expert 1 none, expert 2 eleven; some tokens are in two lists, some in none."""
    tokens = torch.cat([torch.randperm(TOKENS)[:5], torch.randperm(TOKENS)[:11]])
    experts = torch.tensor([0] * 5 + [2] * 11)
    order, weights = torch.randperm(16), torch.rand(16, dtype=torch.float64)
    counts = torch.tensor([5, 0, 11])
    return Assignments(counts, tokens_N=tokens[order], experts_N=experts[order], weights_N=weights, tokens=TOKENS)


@pytest.mark.parametrize("spec", EXPERT_STRINGS)
@pytest.mark.parametrize("make", [token_choice, assignments])
def test_dispatch_equals_a_loop_over_gates(spec: str, make) -> None:
    body, x = experts(spec), torch.randn(SHAPE, dtype=torch.float64)
    routing: Routing = make()
    got = LocalDispatcher()(body, x, routing, MapContext()).reshape(TOKENS, 4)
    flat, gates = x.reshape(TOKENS, 4), routing.gates_TE()
    for t in range(TOKENS):
        wanted = sum(gates[t, e] * one_expert(body, e, flat[t]) for e in range(3))
        torch.testing.assert_close(got[t], wanted, rtol=1e-6, atol=1e-6)


def test_the_assignments_of_a_token_are_summed_in_float32() -> None:
    """In bfloat16, 256 + 1 is 256."""
    body, x = EXPERTS.build("identity(n=300)", dim=4), torch.ones(1, 1, 1, 1, 4, dtype=torch.bfloat16)
    ones = torch.ones(300, dtype=torch.int64)
    routing = Assignments(ones, tokens_N=0 * ones, experts_N=ones.cumsum(0) - 1, weights_N=ones.float(), tokens=1)
    got = LocalDispatcher()(body, x, routing, MapContext())
    assert got.dtype == torch.bfloat16 and torch.all(got == 300)


@pytest.mark.parametrize("spec", EXPERT_STRINGS)
def test_slots_equal_a_loop_over_slots(spec: str) -> None:
    """Two groups of twelve tokens, three experts with two slots each."""
    body, x = experts(spec), torch.randn(SHAPE, dtype=torch.float64)
    keys, queries = torch.randn(2, 12, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    logits = torch.einsum("gmc,sc->gms", keys, queries)
    dispatch, combine = logits.softmax(dim=1), logits.softmax(dim=2)
    groups = Groups(2, (2, 3, 2))
    routing = Slots(torch.full((3,), 4), keys_GMC=keys, queries_SC=queries, groups=groups)
    got = LocalDispatcher()(body, x, routing, MapContext()).reshape(2, 12, 4)
    tokens = x.reshape(2, 12, 4)
    for g in range(2):
        slots = [one_expert(body, s // 2, dispatch[g, :, s] @ tokens[g]) for s in range(6)]
        torch.testing.assert_close(got[g], combine[g] @ torch.stack(slots), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spec", EXPERT_STRINGS)
def test_a_single_expert_takes_every_token_with_weight_one(spec: str) -> None:
    body, x = experts(spec.replace("n=3", "n=1")), torch.randn(SHAPE, dtype=torch.float64)
    got = LocalDispatcher()(body, x, None, MapContext())
    for t, row in enumerate(x.reshape(TOKENS, 4)):
        torch.testing.assert_close(got.reshape(TOKENS, 4)[t], one_expert(body, 0, row), rtol=1e-6, atol=1e-6)


def test_slots_have_no_gates() -> None:
    with pytest.raises(NotImplementedError, match="Slots has no gates per token"):
        ones = {"keys_GMC": torch.ones(1, 1, 1), "queries_SC": torch.ones(1, 1)}
        Slots(torch.ones(1), **ones, groups=Groups(1, (1, 1, 1))).gates_TE()
