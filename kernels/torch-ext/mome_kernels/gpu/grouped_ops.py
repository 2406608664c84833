"""`grouped_linear` and `combine` on a GPU, out of the kernels of this folder; see `cpu_grouped` for the meaning."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from . import experts, grouped_gradient, routing, rows
from .launch import machine_of


@experts.through_float32
def grouped_forward(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, index: Tensor | None, activation: str
) -> Tensor:
    """(N, F) in the order of the offsets."""
    count = x.shape[0] if index is None else index.shape[0]
    checks.offsets_add_up(offsets, count)  # before they are narrowed
    x, weight, bias, offsets, index = experts.contiguous(x, weight, bias, offsets.int(), index)
    if index is not None:
        checks.index_in_range("gather_index", index, x.shape[0])
    if count == 0:
        return torch.empty(0, weight.shape[1], dtype=x.dtype, device=x.device)
    return experts.grouped_linear(
        x, weight, bias, offsets, count, machine_of(x), slots=index, gather=index is not None, activation=activation
    )


@experts.through_float32
def grouped_dx(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Gradient of the rows."""
    grad, weight, offsets = experts.contiguous(grad, weight, offsets.int())
    if grad.shape[0] == 0:
        return torch.empty(0, weight.shape[2], dtype=grad.dtype, device=grad.device)
    return experts.grouped_linear(grad, weight, None, offsets, grad.shape[0], machine_of(grad), transpose=True)


@experts.through_float32
def grouped_dw(grad: Tensor, x: Tensor, offsets: Tensor, index: Tensor | None, bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of weight (E, F, D) and bias (E, F), or an empty tensor."""
    grad, x, offsets, index = experts.contiguous(grad, x, offsets.int(), index)
    dw, db = grouped_gradient.weight_gradient(
        grad, x, offsets, grad.shape[0], grad, grad if bias else None, machine_of(grad), slots=index,
        gather_x=index is not None,
    )  # fmt: skip
    return dw, torch.empty(0, dtype=grad.dtype, device=grad.device) if db is None else db


@experts.through_float32
def combine(y: Tensor, gates: Tensor, inverse: Tensor) -> Tensor:
    """(T, D)."""
    y, gates, inverse = experts.contiguous(y, gates, inverse)
    checks.permutation("inverse_N", inverse)
    return rows.combine(y, gates, inverse, *gates.shape)


@experts.through_float32
def combine_backward(grad: Tensor, y: Tensor, gates: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and the gates."""
    grad, y, gates, inverse = experts.contiguous(grad, y, gates, inverse)
    dy, d_gates = torch.empty_like(y), torch.empty_like(gates)
    rows.plan_combine_backward(grad, y, gates, inverse, dy, d_gates).run()
    return dy, d_gates


def route(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, offsets, permutation and inverse; see `mome_kernels.route`."""
    way = routing.route(ids, num_experts, torch.int64)
    return way.counts, way.offsets, way.permutation, way.inverse
