"""`grouped_linear` and `combine` on the CPU, FLOP counts, and invalid arguments."""

from __future__ import annotations

import re

import mome_kernels as kernels
import pytest
import torch
from mome_kernels import checks, reference
from mome_kernels.custom_ops import experts as expert_ops
from mome_kernels.custom_ops import grouped as grouped_ops
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

OFFSETS = [[0, 5, 9, 20], [0, 0, 20, 20], [0, 20, 20, 20], [0, 0, 0, 20]]


def inputs(indexed: bool, dtype: torch.dtype = torch.float64, offsets: list[int] | None = None) -> dict:
    torch.manual_seed(0)
    leaf = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)  # noqa: E731
    rows = 12 if indexed else 20
    return {
        "x_MD": leaf(rows, 5),
        "weight_EFD": leaf(3, 7, 5),
        "offsets": torch.tensor(offsets or OFFSETS[0]),
        "bias_EF": leaf(3, 7),
        "gather_index": torch.randint(0, 12, (20,)) if indexed else None,
    }


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu", "gelu_tanh"])
def test_grouped_linear(indexed: bool, activation: str) -> None:
    given = inputs(indexed)
    ours = kernels.grouped_linear(**given, activation=activation)
    expected = reference.grouped_linear(**given, activation=activation)
    torch.testing.assert_close(ours, expected)
    leaves = [given[name] for name in ("x_MD", "weight_EFD", "bias_EF")]
    grad = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("offsets", OFFSETS)
def test_empty_groups_get_zero_gradients(offsets: list[int]) -> None:
    given = inputs(False, offsets=offsets)
    kernels.grouped_linear(**given).sum().backward()
    for e in range(3):
        empty = offsets[e] == offsets[e + 1]
        assert bool((given["weight_EFD"].grad[e] == 0).all()) == empty


def test_combine() -> None:
    torch.manual_seed(0)
    y = torch.randn(30, 5, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(10, 3, dtype=torch.float64, requires_grad=True)
    inverse = torch.randperm(30)
    ours, expected = kernels.combine(y, weights_TK, inverse), reference.combine(y, weights_TK, inverse)
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(ours)
    pairs = zip(
        torch.autograd.grad(ours, [y, weights_TK], grad),
        torch.autograd.grad(expected, [y, weights_TK], grad),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_combine_of_no_tokens() -> None:
    y, weights_TK = torch.randn(0, 5, requires_grad=True), torch.rand(0, 3, requires_grad=True)
    out = kernels.combine(y, weights_TK, torch.empty(0, dtype=torch.int64))
    assert out.shape == (0, 5)
    out.sum().backward()
    assert y.grad.shape == (0, 5) and weights_TK.grad.shape == (0, 3)


def test_the_layer_is_route_grouped_linears_and_combine() -> None:
    torch.manual_seed(0)
    x, ids, weights_TK = torch.randn(31, 6), torch.rand(31, 4).topk(2).indices, torch.rand(31, 2)
    up, down = torch.randn(4, 9, 6), torch.randn(4, 6, 9)
    _, offsets, permutation, inverse = kernels.route(ids, 4)
    hidden = kernels.grouped_linear(x, up, offsets, gather_index=permutation // 2, activation="silu")
    out = kernels.combine(kernels.grouped_linear(hidden, down, offsets), weights_TK, inverse)
    torch.testing.assert_close(out, kernels.moe_mlp(x, ids, weights_TK, up, None, down, None, activation="silu"))


def test_opcheck() -> None:
    given = inputs(True, torch.float32)
    x, weight, offsets, bias, index = given.values()
    opcheck(grouped_ops.grouped_linear, (x, weight, offsets, bias, index, "silu"))
    opcheck(grouped_ops.grouped_linear_dx, (torch.randn(20, 7), weight.detach(), offsets))
    opcheck(grouped_ops.grouped_linear_dw, (torch.randn(20, 7), x.detach(), offsets, index, True))
    y, weights_TK, inverse = torch.randn(30, 5, requires_grad=True), torch.rand(10, 3), torch.randperm(30)
    opcheck(grouped_ops.combine, (y, weights_TK.requires_grad_(), inverse))
    opcheck(grouped_ops.combine_backward, (torch.randn(10, 5), y.detach(), weights_TK.detach(), inverse))
    opcheck(grouped_ops.scatter_rows, (torch.randn(20, 5), index, 12))


def test_compiles_whole_with_dynamic_rows() -> None:
    torch._dynamo.reset()

    def layer(x, weight, offsets, bias):
        return kernels.grouped_linear(x, weight, offsets, bias, activation="gelu").square().sum()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for last in (20, 13):
        given = inputs(False, torch.float32, [0, 4, 4, last])
        x, weight, offsets, bias, _ = given.values()
        x = x.detach()[:last].requires_grad_()
        got = torch.autograd.grad(compiled(x, weight, offsets, bias), [x, weight, bias])
        want = torch.autograd.grad(layer(x, weight, offsets, bias), [x, weight, bias])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_flops_are_counted() -> None:
    x, ids, weights_TK = torch.randn(31, 6), torch.rand(31, 4).topk(2).indices, torch.rand(31, 2)
    up, down = torch.randn(4, 18, 6), torch.randn(4, 6, 9)
    with FlopCounterMode(display=False) as forward:
        kernels.moe_mlp(x, ids, weights_TK, up, None, down, None, gated=True)
    assert forward.get_total_flops() == 2 * 62 * (18 * 6 + 6 * 9)
    with FlopCounterMode(display=False) as both:
        kernels.moe_linear(x.requires_grad_(), ids, weights_TK, up, None).sum().backward()
    assert both.get_total_flops() == 3 * 2 * 62 * 18 * 6
    with FlopCounterMode(display=False) as kept:  # z is kept on a CPU, so that nothing is computed twice
        kernels.moe_mlp(x, ids, weights_TK, up, None, down, None, gated=True).sum().backward()
    assert kept.get_total_flops() == 3 * forward.get_total_flops()


def test_views_give_the_same_numbers() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 31).t()
    ids, weights_TK = torch.rand(4, 31).topk(2, dim=0).indices.t(), torch.rand(2, 31).t()
    up, down = torch.randn(4, 6, 9).transpose(1, 2), torch.randn(6, 4, 9).transpose(0, 1)
    plain = [t.contiguous() for t in (x, ids, weights_TK, up, down)]
    ours = kernels.moe_mlp(x, ids, weights_TK, up, None, down, None)
    torch.testing.assert_close(ours, kernels.moe_mlp(*plain[:4], None, plain[4], None))
    narrow = kernels.moe_mlp(x, ids.to(torch.int32), weights_TK, up, None, down, None)
    torch.testing.assert_close(ours, narrow)


def test_more_experts_per_token_than_experts() -> None:
    x, weights_TK = torch.randn(5, 6, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    ids = torch.tensor([[0, 1, 0]] * 5)
    weight = torch.randn(2, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(
        kernels.moe_linear(x, ids, weights_TK, weight), reference.moe_linear(x, ids, weights_TK, weight, None)
    )


LAYER = {
    "x_TD": torch.randn(5, 6), "ids_TK": torch.tensor([[0, 1]] * 5), "weights_TK": torch.rand(5, 2),
    "up_EFD": torch.randn(3, 8, 6), "up_bias_EF": None, "down_EDF": torch.randn(3, 6, 8), "down_bias_ED": None,
}  # fmt: skip


CHANGES = [
    ({"ids_TK": torch.tensor([[0, 3]] * 5)}, ValueError, "ids_TK has ids from 0 to 3, expected 0 to 2"),
    ({"ids_TK": torch.tensor([[0, -1]] * 5)}, ValueError, "ids_TK has ids from -1 to 0"),
    ({"ids_TK": torch.rand(5, 2)}, TypeError, "ids_TK has dtype torch.float32, expected uint8, int8"),
    ({"ids_TK": torch.zeros(4, 2).long()}, ValueError, "ids_TK has shape (4, 2)"),
    ({"weights_TK": torch.rand(5, 3)}, ValueError, "weights_TK has shape (5, 3)"),
    ({"weights_TK": torch.ones(5, 2).long()}, TypeError, "weights_TK has dtype torch.int64, expected a floating"),
    ({"up_EFD": torch.randn(3, 8, 7)}, ValueError, "up_EFD has shape (3, 8, 7), expected (E, F, D) = (3, 8, 6)"),
    ({"gated": True}, ValueError, "up_EFD has shape (3, 8, 6), expected (E, 2F, D) = (3, 16, 6)"),
    ({"up_bias_EF": torch.randn(3, 9)}, ValueError, "up_bias_EF has shape (3, 9), expected (E, F) = (3, 8)"),
    ({"down_EDF": torch.ones(3, 6, 8).int()}, TypeError, "down_EDF has dtype torch.int32, expected a floating"),
    ({"down_EDF": torch.randn(3, 6, 8, device="meta")}, ValueError, "down_EDF is on meta, expected cpu"),
    ({"x_TD": torch.randn(5, 6).to(torch.float8_e4m3fn)}, TypeError, "x_TD has dtype torch.float8_e4m3fn, expected"),
    (
        {"x_TD": torch.randn(5, 6).bfloat16()},
        TypeError,
        "up_EFD has dtype torch.float32, expected torch.bfloat16, that of x_TD, or autocast",
    ),
    ({"x_TD": torch.randn(5, 6, 1)}, ValueError, "x_TD has shape (5, 6, 1), expected (T, D)"),
]


@pytest.mark.parametrize(("change", "error", "message"), CHANGES)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        kernels.moe_mlp(**{**LAYER, **change})


def test_mixed_dtypes_need_autocast() -> None:
    x, weight, offsets = torch.randn(10, 4).bfloat16(), torch.randn(2, 3, 4), torch.tensor([0, 4, 10])
    with pytest.raises(TypeError, match="weight_EFD has dtype torch.float32, expected torch.bfloat16, that of x_MD"):
        kernels.grouped_linear(x, weight, offsets)
    with pytest.raises(TypeError, match="weight_EFD has dtype torch.float32, expected torch.bfloat16, that of x_TD"):
        kernels.moe_linear(x, torch.zeros(10, 1).long(), torch.ones(10, 1), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.grouped_linear(x, weight, offsets).dtype == torch.bfloat16
    weights_TK = torch.rand(10, 1)  # float32, the dtype of routers
    assert kernels.moe_linear(x, torch.zeros(10, 1).long(), weights_TK, weight.bfloat16()).dtype == torch.bfloat16


def test_offsets_that_do_not_add_up_are_refused() -> None:
    x, weight = torch.randn(10, 4), torch.randn(2, 3, 4)
    for offsets in ([0, 5, 9], [1, 5, 10], [0, 11, 10]):
        with pytest.raises(ValueError, match="must rise from 0 to the number of rows, 10"):
            kernels.grouped_linear(x, weight, torch.tensor(offsets))
    for dtype in (torch.uint8, torch.int32):  # the differences of unsigned integers wrap around
        with pytest.raises(ValueError, match="must rise from 0 to the number of rows, 10"):
            kernels.grouped_linear(x, weight, torch.tensor([0, 11, 10], dtype=dtype))
        narrow = kernels.grouped_linear(x, weight, torch.tensor([0, 4, 10], dtype=dtype))
        torch.testing.assert_close(narrow, kernels.grouped_linear(x, weight, torch.tensor([0, 4, 10])))
    with pytest.raises(ValueError, match=r"offsets has shape \(2,\), expected \(E \+ 1,\) = \(3,\)"):
        kernels.grouped_linear(x, weight, torch.tensor([0, 10]))


def test_indices_that_do_not_fit_are_refused() -> None:
    given = {**inputs(True), "gather_index": torch.tensor([0, 12] * 10)}
    with pytest.raises(ValueError, match="gather_index must hold integers from 0 to 11; got 0 to 12"):
        kernels.grouped_linear(**given)
    narrow = {**inputs(True), "gather_index": inputs(True)["gather_index"].to(torch.int8)}
    torch.testing.assert_close(kernels.grouped_linear(**narrow), kernels.grouped_linear(**inputs(True)))
    for inverse, message in (([0, 0], "inverse_N must hold each of 0 … 1 once"), ([0, 2], "got 0 to 2")):
        with pytest.raises(ValueError, match=message):
            kernels.combine(torch.randn(2, 3), torch.ones(2, 1), torch.tensor(inverse))


def test_too_many_assignments_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 2147479552 assignments"):
        kernels.route(torch.empty(2**30, 2, dtype=torch.int64, device="meta"), 4)
    with torch.device("meta"):
        checks.ids(torch.empty(2**31 - 4096, 1, dtype=torch.int64))
        with pytest.raises(ValueError, match="more than 2147479552 assignments"):
            checks.ids(torch.empty(2**31 - 4095, 1, dtype=torch.int64))
        many, weight = torch.empty(2**31 - 4095, 1), torch.empty(2, 3, 1)
        with pytest.raises(ValueError, match=r"x_MD has shape \(2147479553, 1\): more than 2147479552 rows"):
            kernels.grouped_linear(many, weight, torch.empty(3, dtype=torch.int64))
        with pytest.raises(ValueError, match="weights_TK has shape .* more than 2147479552 assignments"):
            kernels.combine(many, many, torch.empty(2**31 - 4095, dtype=torch.int64))


def test_kept_hidden_layer_of_the_fake_has_the_shape_of_z() -> None:
    with torch.device("meta"):
        x, ids, weights_TK = torch.empty(5, 6), torch.empty(5, 2, dtype=torch.int64), torch.empty(5, 2)
        up, down = torch.empty(3, 16, 6), torch.empty(3, 6, 8)
    out, hidden, *order = expert_ops.moe_mlp(x, ids, weights_TK, up, None, down, None, "silu", True, True)
    assert out.shape == (5, 6) and hidden.shape == (10, 16) and [len(part) for part in order] == [0, 0, 0]
