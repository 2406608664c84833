"""`grouped_linear`, `combine` and `route` on a GPU: the functions of `torch_impl.grouped` and `torch_impl.routing`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from . import grouped_gradient, routing, rows
from .grouped_linear import run_linear
from .interpreter import through_float32
from .launch import contiguous, empty, machine_of


@through_float32
def grouped_forward(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, index: Tensor | None, activation: str
) -> Tensor:
    """See `mome_kernels.grouped_linear`."""
    count = x.shape[0] if index is None else index.shape[0]
    checks.offsets_in_order(offsets, count)  # before they are narrowed to 32 bits
    x, weight, bias, offsets, index = contiguous(x, weight, bias, offsets.int(), index)
    if index is not None:
        checks.index_in_range("gather_index", index, x.shape[0])
    if count == 0:
        return empty(x, 0, weight.shape[1])
    return run_linear(
        x, weight, bias, offsets, count, machine_of(x), slots=index, gather=index is not None, activation=activation
    )


@through_float32
def grouped_dx(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Gradient of the rows."""
    grad, weight, offsets = contiguous(grad, weight, offsets.int())
    if grad.shape[0] == 0:
        return empty(grad, 0, weight.shape[2])
    return run_linear(grad, weight, None, offsets, grad.shape[0], machine_of(grad), transpose=True)


@through_float32
def grouped_dw(grad: Tensor, x: Tensor, offsets: Tensor, index: Tensor | None, bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of weight (E, F, D) and bias (E, F); without a bias the second is empty."""
    grad, x, offsets, index = contiguous(grad, x, offsets.int(), index)
    dw, db = grouped_gradient.weight_gradient(
        grad, x, offsets, grad.shape[0], grad, grad if bias else None, machine_of(grad), slots=index,
        gather_x=index is not None,
    )  # fmt: skip
    return dw, empty(grad, 0) if db is None else db


@through_float32
def combine(y: Tensor, weights_TK: Tensor, inverse: Tensor) -> Tensor:
    """See `mome_kernels.combine`."""
    y, weights_TK, inverse = contiguous(y, weights_TK, inverse)
    checks.permutation("inverse_N", inverse)
    return rows.combine(y, weights_TK, inverse, *weights_TK.shape)


@through_float32
def combine_backward(grad: Tensor, y: Tensor, weights_TK: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the routing weights."""
    grad, y, weights_TK, inverse = contiguous(grad, y, weights_TK, inverse)
    dy, d_weights_TK = torch.empty_like(y), torch.empty_like(weights_TK)
    rows.plan_combine_backward(grad, y, weights_TK, inverse, dy, d_weights_TK).run()
    return dy, d_weights_TK


def route(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, offsets, permutation and inverse; see `mome_kernels.route`."""
    order = routing.route(ids_TK, num_experts, torch.int64)
    return order.counts, order.offsets, order.permutation, order.inverse
