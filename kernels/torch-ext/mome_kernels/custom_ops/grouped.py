"""Grouped linear layers and the weighted sum of their rows as torch ops; forward, dX and dW are separate ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..torch_impl.grouped import scatter_rows as sum_rows
from .registration import differentiable, fake, operator


@operator("grouped_linear")
def grouped_linear(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, index: Tensor | None, activation: str
) -> Tensor:
    with dispatch.op_context(x):
        return dispatch.grouped(x).grouped_forward(x, weight, offsets, bias, index, activation)


@fake(grouped_linear)
def _(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, index: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(x.shape[0] if index is None else index.shape[0], weight.shape[1])


@operator("grouped_linear_dx")
def grouped_linear_dx(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    with dispatch.op_context(grad):
        return dispatch.grouped(grad).grouped_dx(grad, weight, offsets)


@fake(grouped_linear_dx)
def _(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[2])


@operator("grouped_linear_dw")
def grouped_linear_dw(
    grad: Tensor, x: Tensor, offsets: Tensor, index: Tensor | None, bias: bool
) -> tuple[Tensor, Tensor]:
    with dispatch.op_context(grad):
        return dispatch.grouped(grad).grouped_dw(grad, x, offsets, index, bias)


@fake(grouped_linear_dw)
def _(grad: Tensor, x: Tensor, offsets: Tensor, index: Tensor | None, bias: bool) -> tuple[Tensor, Tensor]:
    experts = offsets.shape[0] - 1
    dw = grad.new_empty(experts, grad.shape[1], x.shape[1])
    return dw, grad.new_empty(experts, grad.shape[1]) if bias else grad.new_empty(0)


@operator("scatter_rows")
def scatter_rows(grad: Tensor, index: Tensor, rows: int) -> Tensor:
    # a separate op, since a compiler would turn the sum into atomic additions
    with dispatch.op_context(grad):
        return sum_rows(grad, index, rows)


@fake(scatter_rows)
def _(grad: Tensor, index: Tensor, rows: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[1])


def _activation_backward(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, z)
    if activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_backward(grad, z, approximate=approximate)
    return grad * (z > 0) if activation == "relu" else grad


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, offsets, bias, index = ctx.saved_tensors
    grad = grad.contiguous()
    if ctx.activation != "none":
        z = grouped_linear(x, weight, offsets, bias, index, "none")
        grad = _activation_backward(grad, z, ctx.activation)
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = grouped_linear_dx(grad, weight, offsets)
        if index is not None:
            dx = scatter_rows(dx, index, x.shape[0])
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
        dw, db = grouped_linear_dw(grad, x, offsets, index, bias is not None)
    return dx, dw, None, db if bias is not None else None, None, None


differentiable(grouped_linear, _gradients, _setup)
for _op in (grouped_linear_dx, grouped_linear_dw, scatter_rows):
    differentiable(_op)


@operator("combine")
def combine(y: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    with dispatch.op_context(y):
        return dispatch.grouped(y).combine(y, weights, inverse)


@fake(combine)
def _(y: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    return y.new_empty(weights.shape[0], y.shape[1])


@operator("combine_backward")
def combine_backward(grad: Tensor, y: Tensor, weights: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    with dispatch.op_context(y):
        return dispatch.grouped(y).combine_backward(grad, y, weights, inverse)


@fake(combine_backward)
def _(grad: Tensor, y: Tensor, weights: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *combine_backward(grad.contiguous(), *ctx.saved_tensors), None


differentiable(combine, _combine_gradients, _combine_setup)
differentiable(combine_backward)
