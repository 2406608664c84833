"""The token experts lora, identity, zero, constant and adaptive against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from expert_reference import DIM, TOKENS, assert_gradients, assignments, build, loop, one_expert, slowly_too, tokens
from torch import Tensor

from mome.map_context import MapContext
from mome.registry import ROUTERS

ADAPTIVE = "adaptive(experts=swiglu(n=3, hidden=5), zero=2, identity=1, constant=2)"
TOKEN_STRINGS = [
    "lora(n=3, rank=2, alpha=3.0)",
    "lora(n=3, rank=2, base=mlp(hidden=5))",
    "identity(n=2)",
    "zero(n=2)",
    "constant(n=3)",
    ADAPTIVE,
    "adaptive(experts=linear(n=2), zero=0, identity=2, constant=0)",
    "shared(routed=mlp(n=3, hidden=5), shared=swiglu(hidden=3))",
]


@pytest.mark.parametrize("base", ["linear", "mlp(hidden=5)"])
def test_lora_is_its_base_and_a_low_rank_difference(base: str) -> None:
    body, x = build(f"lora(n=4, rank=2, alpha=3.0, base={base})"), tokens()
    ids, weights = assignments(4)

    def expert(e: int, x_D: Tensor) -> Tensor:
        return one_expert(body.base, 0, x_D) + 3 / 2 * body.expand_EDR[e] @ (body.reduce_ERD[e] @ x_D)

    torch.testing.assert_close(body(x, ids, weights), loop(x, ids, weights, expert))


def test_the_base_of_lora_runs_once_for_every_token() -> None:
    rows: list[int] = []
    for base in ("linear", "mlp(hidden=5)"):
        body = build(f"lora(n=4, rank=2, base={base})")
        body.base.register_forward_pre_hook(lambda module, given: rows.append(given[0].shape[0]))
        body(tokens(), *assignments(4, k=3))
    assert rows == [TOKENS, TOKENS]


def test_identity_and_zero() -> None:
    x, (ids, weights) = tokens(), assignments(2)
    torch.testing.assert_close(build("identity(n=2)")(x, ids, weights), loop(x, ids, weights, lambda e, x_D: x_D))
    assert torch.equal(build("zero(n=2)")(x, ids, weights), torch.zeros(TOKENS, DIM, dtype=torch.float64))


def constant(body: torch.nn.Module, e: int, x_D: Tensor) -> Tensor:
    """MoE++'s constant expert for one token."""
    a = torch.softmax(body.blend_E2D[e] @ x_D, dim=0)
    return a[0] * x_D + a[1] * body.vector_ED[e]


def test_constant_blends_the_token_and_its_vector() -> None:
    body, x = build("constant(n=3)"), tokens()
    ids, weights = assignments(3)
    torch.testing.assert_close(body(x, ids, weights), loop(x, ids, weights, lambda e, x_D: constant(body, e, x_D)))


def adaptive(body: torch.nn.Module, e: int, x_D: Tensor) -> Tensor:
    """One expert of `ADAPTIVE`: three that compute, two constants, one identity, two zeros."""
    if e < 3:
        return one_expert(body.experts, e, x_D)
    if e < 5:
        return constant(body.constants, e - 3, x_D)
    return x_D if e == 5 else torch.zeros_like(x_D)


def test_adaptive_keeps_the_sum_of_the_weights_where_zero_experts_were_chosen() -> None:
    body, x = build(ADAPTIVE), tokens()
    ids, weights = assignments(9)  # all eight experts have tokens
    ids[0], ids[1] = torch.tensor([6, 7, 6]), torch.tensor([2, 7, 2])
    scaled = torch.zeros_like(weights)
    for t in range(TOKENS):
        kept = [w if e < 6 else torch.zeros(()) for e, w in zip(ids[t].tolist(), weights[t], strict=True)]
        if any(e < 6 for e in ids[t].tolist()):
            scaled[t] = torch.stack([w / sum(kept) * weights[t].sum() for w in kept])
    got = body(x, ids, weights)
    torch.testing.assert_close(got, loop(x, ids, scaled, lambda e, x_D: adaptive(body, e, x_D)))
    assert not got[0].any() and torch.equal(scaled[0], torch.zeros(3, dtype=torch.float64))


def test_adaptive_without_scaling_is_the_plain_sum() -> None:
    body, x = build(ADAPTIVE.replace("zero=2", "renormalize=false, zero=2")), tokens()
    ids, weights = assignments(9)
    torch.testing.assert_close(body(x, ids, weights), loop(x, ids, weights, lambda e, x_D: adaptive(body, e, x_D)))


def test_adaptive_with_topk_is_what_moe_plus_plus_computes() -> None:
    """Softmax, the best two, the zero expert's share set to 0, and only then divided by the sum."""
    body = build("adaptive(experts=swiglu(n=2, hidden=5), zero=1, identity=1, constant=1)")
    torch.manual_seed(4)
    router = ROUTERS.build("topk(k=2)", dim=DIM, num_experts=5)
    x = tokens()
    routing = router(x.view(1, 2, 3, 4, DIM), MapContext())
    probabilities = (x.float() @ router.weight_EC.T).softmax(-1)
    got, zeros = body(x, routing.ids_TK, routing.weights_TK.double()), 0
    for t in range(TOKENS):
        chosen = probabilities[t].argsort(descending=True)[:2].tolist()
        shares = {e: probabilities[t, e].double() if e != 4 else torch.zeros(()) for e in chosen}
        zeros += 4 in chosen
        wanted = torch.zeros(DIM, dtype=torch.float64)
        for e, share in shares.items():
            result = (
                one_expert(body.experts, e, x[t]) if e < 2 else constant(body.constants, 0, x[t]) if e == 2 else x[t]
            )
            wanted = wanted + share / sum(shares.values()) * result
        torch.testing.assert_close(got[t], wanted, rtol=1e-5, atol=1e-6)
    assert zeros


def test_a_token_with_zero_experts_alone_is_zero_and_has_finite_gradients() -> None:
    body, x = build(ADAPTIVE), tokens().requires_grad_()
    ids = torch.full((TOKENS, 2), 6)
    for weights in (torch.full((TOKENS, 2), 0.5), torch.zeros(TOKENS, 2)):
        weights = weights.double().requires_grad_()
        y = body(x, ids, weights)
        assert not y.any()
        y.sum().backward()
        assert torch.isfinite(x.grad).all() and torch.isfinite(weights.grad).all()


def test_only_tokens_of_nested_experts_become_rows() -> None:
    body = build(ADAPTIVE)
    rows: list[Tensor] = []
    body.experts.register_forward_pre_hook(lambda module, given: rows.append(given[0]))
    ids, weights = assignments(9)
    body(tokens(), ids, weights)
    assert rows[0].shape[0] == int((ids < 3).sum()) < ids.numel()
    body(tokens(), torch.full((TOKENS, 1), 5), torch.ones(TOKENS, 1))
    assert rows[1].shape[0] == 0


def test_identities_after_the_experts_are_longcats() -> None:
    body, x = build("adaptive(experts=linear(n=2), zero=0, identity=2, constant=0)"), tokens()
    ids, weights = assignments(5)
    assert body.num_experts == 4

    def expert(e: int, x_D: Tensor) -> Tensor:
        return body.experts.weight_EDD[e] @ x_D + body.experts.bias_ED[e] if e < 2 else x_D

    torch.testing.assert_close(body(x, ids, weights), loop(x, ids, weights, expert))


@slowly_too
@pytest.mark.parametrize("spec", TOKEN_STRINGS)
def test_gradients(spec: str, fast: bool) -> None:
    body = build(spec)
    ids, weights = assignments(body.num_experts, k=2)
    assert_gradients(body, lambda b, x, w: b(x, ids[:5], w), tokens()[:5], weights[:5], fast=fast)


@pytest.mark.parametrize("spec", TOKEN_STRINGS)
def test_bfloat16_is_close_and_keeps_its_type(spec: str) -> None:
    body, x = build(spec).bfloat16(), tokens().bfloat16()
    ids, weights = assignments(body.num_experts)
    got = body(x, ids, weights.float())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), body.double()(x.double(), ids, weights), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("spec", TOKEN_STRINGS)
def test_a_batch_without_tokens_is_empty(spec: str) -> None:
    body = build(spec)
    got = body(tokens()[:0], torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert got.shape == (0, DIM)
