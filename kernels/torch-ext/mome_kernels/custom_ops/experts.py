"""Routing and expert layers as torch ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..weights import ExpertWeights
from .registration import differentiable, fake, operator

# The fields of `ExpertWeights` as a schema has them.
_EXPERTS = "Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, str activation, bool gated"
_COUNT = len(ExpertWeights._fields)


def _empty_like(tensor: Tensor | None, otherwise: Tensor) -> Tensor:
    """A contiguous tensor of the same shape, or an empty one where there is none: an op cannot return None."""
    return otherwise.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)


# -- routing ------------------------------------------------------------------------------------------------


@operator("route")
def route(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with dispatch.op_context(ids):
        return dispatch.routing(ids).route(ids, num_experts)


@fake(route)
def _(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = ids.numel()
    return (
        ids.new_empty(num_experts, dtype=torch.int32),
        ids.new_empty(num_experts + 1, dtype=torch.int32),
        ids.new_empty(n, dtype=torch.int64),
        ids.new_empty(n, dtype=torch.int64),
    )


# -- feed-forward experts ---------------------------------------------------------------------------------------


@operator(
    "moe_mlp",
    f"(Tensor x, Tensor ids, Tensor weights, {_EXPERTS}, bool keep_hidden) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def moe_mlp(x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """(T, D) tokens, and what the backward pass may need: z, and the fields of an `AssignmentOrder`.

    z, in expert order, is empty without `keep_hidden`.
    """
    experts, (keep_hidden,) = ExpertWeights(*rest[:_COUNT]), rest[_COUNT:]
    with dispatch.op_context(x):
        return dispatch.experts(x).mlp_forward(x, ids, weights, experts, keep_hidden)


@fake(moe_mlp)
def _(x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    experts, (keep_hidden,) = ExpertWeights(*rest[:_COUNT]), rest[_COUNT:]
    n = ids.numel()
    hidden = x.new_empty(n, experts.up_width) if keep_hidden else x.new_empty(0)
    lengths = (n, n, experts.num_experts + 1) if dispatch.runs_kernels(x) else (0, 0, 0)
    order = (x.new_empty(length, dtype=torch.int32) for length in lengths)
    return x.new_empty(x.shape[0], experts.out_width), hidden, *order


@operator(
    "moe_mlp_backward",
    f"(Tensor grad, Tensor x, Tensor ids, Tensor weights, {_EXPERTS}, Tensor hidden, Tensor permutation,"
    " Tensor inverse, Tensor offsets)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def moe_mlp_backward(grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of x, weights, up, up_bias, down, down_bias; the last four arguments are results of `moe_mlp`."""
    experts, kept = ExpertWeights(*rest[:_COUNT]), rest[_COUNT:]
    with dispatch.op_context(x):
        return dispatch.experts(x).mlp_backward(grad, x, ids, weights, experts, *kept)


@fake(moe_mlp_backward)
def _(grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    experts = ExpertWeights(*rest[:_COUNT])
    parameters = (experts.up, experts.up_bias, experts.down, experts.down_bias)
    return tuple(_empty_like(tensor, x) for tensor in (x, weights, *parameters))


def _mlp_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation, ctx.gated, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)  # what is kept has no gradient


def _mlp_gradients(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    x, ids, weights, up, up_bias, down, down_bias, *kept = ctx.saved_tensors
    if grad is None:
        return (None,) * (3 + _COUNT + 1)
    experts = ExpertWeights(up, up_bias, down, down_bias, ctx.activation, ctx.gated)
    d_x, d_weights, d_up, d_up_bias, d_down, d_down_bias = moe_mlp_backward(
        grad.contiguous(), x, ids, weights, *experts, *kept
    )
    return (
        d_x, None, d_weights, d_up, None if up_bias is None else d_up_bias, d_down,
        None if down_bias is None else d_down_bias, None, None, None,
    )  # fmt: skip


differentiable(moe_mlp, _mlp_gradients, _mlp_setup)
differentiable(moe_mlp_backward)


# -- linear experts ---------------------------------------------------------------------------------------------


@operator("moe_linear")
def moe_linear(x: Tensor, ids: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with dispatch.op_context(x):
        return dispatch.experts(x).linear_forward(x, ids, weights, weight, bias)


@fake(moe_linear)
def _(x: Tensor, ids: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@operator("moe_linear_backward")
def moe_linear_backward(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, weight, bias."""
    with dispatch.op_context(x):
        return dispatch.experts(x).linear_backward(grad, x, ids, weights, weight, bias)


@fake(moe_linear_backward)
def _(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_like(x, x), _empty_like(weights, x), _empty_like(weight, x), _empty_like(bias, x)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, ids, weights, weight, bias = ctx.saved_tensors
    d_x, d_weights, d_weight, d_bias = moe_linear_backward(grad.contiguous(), x, ids, weights, weight, bias)
    return d_x, None, d_weights, d_weight, None if bias is None else d_bias


differentiable(moe_linear, _linear_gradients, _linear_setup)
differentiable(moe_linear_backward)
