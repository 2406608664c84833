"""Grouped linear layers and the weighted sum of their rows in torch: one matrix product per expert."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks
from .activation import activate


def _groups(offsets: Tensor, rows: int) -> list[int]:
    checks.offsets_in_order(offsets, rows)
    return offsets.long().diff().tolist()


def _checked_index(index: Tensor | None, x: Tensor) -> Tensor | None:
    if index is None:
        return None
    checks.index_in_range("gather_index", index, x.shape[0])
    return index.long()


def grouped_forward(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, index: Tensor | None, activation: str
) -> Tensor:
    """See `mome_kernels.grouped_linear`."""
    index = _checked_index(index, x)
    count = x.shape[0] if index is None else index.shape[0]
    out = x.new_empty(count, weight.shape[1])
    groups = _groups(offsets, count)
    parts = x.split(groups) if index is None else index.split(groups)
    # unbound once, since under autograd weight[e] would create a full-size view for every expert
    for e, (part, w, target) in enumerate(zip(parts, weight.unbind(0), out.split(groups), strict=True)):
        if target.shape[0]:
            rows = part if index is None else x.index_select(0, part)
            z = F.linear(rows, w, None if bias is None else bias[e])
            target.copy_(activate(z, activation, z))
    return out


def grouped_dx(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Gradient of the rows."""
    out = grad.new_empty(grad.shape[0], weight.shape[2])
    groups = _groups(offsets, grad.shape[0])
    for part, w, target in zip(grad.split(groups), weight.unbind(0), out.split(groups), strict=True):
        if part.shape[0]:
            torch.mm(part, w, out=target)
    return out


def grouped_dw(grad: Tensor, x: Tensor, offsets: Tensor, index: Tensor | None, bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of weight (E, F, D) and bias (E, F); without a bias the second is empty."""
    index = _checked_index(index, x)
    groups = _groups(offsets, grad.shape[0])
    dw = grad.new_zeros(len(groups), grad.shape[1], x.shape[1])
    db = grad.new_zeros((len(groups), grad.shape[1]) if bias else 0)
    parts = x.split(groups) if index is None else index.split(groups)
    for e, (dy, part) in enumerate(zip(grad.split(groups), parts, strict=True)):
        if dy.shape[0]:
            rows = part if index is None else x.index_select(0, part)
            torch.mm(dy.t(), rows, out=dw[e])
            if bias:
                torch.sum(dy, 0, out=db[e])
    return dw, db


def scatter_rows(grad: Tensor, index: Tensor, rows: int) -> Tensor:
    """(rows, D): for each row the sum of the gradients of its copies, in float32 and in a fixed order."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    out = torch.zeros(rows, grad.shape[1], dtype=wide, device=grad.device)
    if grad.device.type == "cpu":  # index_add adds row after row on a CPU
        out.index_add_(0, index.long(), grad.to(wide))
    else:  # index_put sorts the index first; index_add would add atomically, in no fixed order
        out.index_put_((index.long(),), grad.to(wide), accumulate=True)
    return out.to(grad.dtype)


def combine(y: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    """See `mome_kernels.combine`."""
    wide = torch.promote_types(y.dtype, torch.float32)
    checks.permutation("inverse_N", inverse)
    rows = y.index_select(0, inverse.reshape(-1).long()).view(*weights.shape, y.shape[1]).to(wide)
    return torch.einsum("tkd,tk->td", rows, weights.to(wide)).to(y.dtype)


def combine_backward(grad: Tensor, y: Tensor, weights: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the routing weights."""
    wide = torch.promote_types(y.dtype, torch.float32)
    rows = y.index_select(0, inverse.reshape(-1).long()).view(*weights.shape, y.shape[1]).to(wide)
    grad = grad.to(wide)
    d_weights = torch.einsum("tkd,td->tk", rows, grad).to(weights.dtype)
    dy = torch.empty_like(y, memory_format=torch.contiguous_format)
    d_rows = (grad[:, None] * weights.to(wide)[..., None]).reshape(-1, y.shape[1]).to(y.dtype)
    dy[inverse.reshape(-1).long()] = d_rows
    return dy, d_weights
