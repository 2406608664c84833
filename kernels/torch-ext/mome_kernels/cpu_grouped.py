"""Grouped linear layers and the combine in torch ops: one product per expert, for any dtype and size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks
from .cpu_experts import activate


def _groups(offsets: Tensor, rows: int) -> list[int]:
    checks.offsets_add_up(offsets, rows)
    return offsets.long().diff().tolist()


def _rows_of(index: Tensor | None, x: Tensor) -> Tensor | None:
    if index is None:
        return None
    checks.index_in_range("gather_index", index, x.shape[0])
    return index.long()


def grouped_forward(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, index: Tensor | None, activation: str
) -> Tensor:
    """See `mome_kernels.grouped_linear`."""
    index = _rows_of(index, x)
    count = x.shape[0] if index is None else index.shape[0]
    out = x.new_empty(count, weight.shape[1])
    groups = _groups(offsets, count)
    parts = x.split(groups) if index is None else index.split(groups)
    # unbind once: indexing weight[e] in a loop would cost a full-size view per expert under autograd
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
    """Gradients of weight (E, F, D) and bias (E, F), or an empty tensor."""
    index = _rows_of(index, x)
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
    """(rows, D): each row the sum of the gradient rows that were gathered from it, in float32, in a fixed order."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    out = torch.zeros(rows, grad.shape[1], dtype=wide, device=grad.device)
    if grad.device.type == "cpu":  # row after row
        out.index_add_(0, index.long(), grad.to(wide))
    else:  # sorts the index first, unlike index_add, which adds atomically
        out.index_put_((index.long(),), grad.to(wide), accumulate=True)
    return out.to(grad.dtype)


def combine(y: Tensor, gates: Tensor, inverse: Tensor) -> Tensor:
    """See `mome_kernels.combine`."""
    wide = torch.promote_types(y.dtype, torch.float32)
    checks.permutation("inverse_N", inverse)
    rows = y.index_select(0, inverse.reshape(-1).long()).view(*gates.shape, y.shape[1]).to(wide)
    return torch.einsum("tkd,tk->td", rows, gates.to(wide)).to(y.dtype)


def combine_backward(grad: Tensor, y: Tensor, gates: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and the gates."""
    wide = torch.promote_types(y.dtype, torch.float32)
    rows = y.index_select(0, inverse.reshape(-1).long()).view(*gates.shape, y.shape[1]).to(wide)
    grad = grad.to(wide)
    d_gates = torch.einsum("tkd,td->tk", rows, grad).to(gates.dtype)
    dy = torch.empty_like(y, memory_format=torch.contiguous_format)
    share = (grad[:, None] * gates.to(wide)[..., None]).reshape(-1, y.shape[1]).to(y.dtype)
    dy[inverse.reshape(-1).long()] = share
    return dy, d_gates
