"""Expert layers in torch: rows sorted by expert, computed in blocks that stay in cache.

Of the intermediates at most z, the hidden layer before its activation, is kept for the backward pass. A routing weight
scales the input and output rows of an expert, which are narrower than its hidden layer; everything in between is linear
in the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..order import AssignmentOrder
from ..weights import ExpertWeights
from .activation import activate, activate_backward
from .routing import ExpertBlocks
from .scratch import Scratch

_ALL = slice(None)
_FEWEST_ROWS = 64


class _GradientSum:
    """The gradient of a stacked parameter, summed block by block; half precision is summed in float32."""

    def __init__(self, parameter: Tensor, counts: list[int]) -> None:
        wide = torch.promote_types(parameter.dtype, torch.float32)
        self.dtype = parameter.dtype
        self.total = torch.empty_like(parameter, dtype=wide, memory_format=torch.contiguous_format)
        for expert, count in enumerate(counts):
            if not count:
                self.total[expert].zero_()

    def add_product(self, expert: int, a: Tensor, b: Tensor, first: bool, rows: slice = _ALL) -> None:
        """Sets total[expert][rows] = a @ b for the expert's first block, and adds a @ b for the others."""
        into = self.total[expert][rows]
        if into.dtype != a.dtype:
            self.add_row_sum(expert, (a @ b)[None], first, rows)
        elif first:
            torch.mm(a, b, out=into)
        else:
            into.addmm_(a, b)

    def add_row_sum(self, expert: int, x: Tensor, first: bool, rows: slice = _ALL) -> None:
        """Adds the sum over dimension 0; `sum` adds pairwise, which a product with a vector of ones would not."""
        total = x.sum(0, dtype=self.total.dtype)
        if first:
            self.total[expert][rows] = total
        else:
            self.total[expert][rows] += total

    def result(self) -> Tensor:
        return self.total.to(self.dtype)


def _padded(count: int, x: Tensor) -> int:
    """The rows that a block of `count` rows is computed with: more where the library compiles products for every size.

    oneDNN compiles a product of bfloat16 for every number of rows, which takes longer than the product itself, and
    experts get another number in every tile. Four sizes between two powers of two are used again instead.
    """
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return count
    step = max(_FEWEST_ROWS, 1 << max(count.bit_length() - 3, 0))
    return -(-count // step) * step


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """x @ weight.T + bias."""
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _of(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


def _in_slot_order(d_weights_N: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the routing weights (T, K) from its values in expert order."""
    d_weights = torch.empty_like(weights.reshape(-1))
    d_weights[slots] = d_weights_N.to(d_weights.dtype)
    return d_weights.view_as(weights)


def _gates(weights: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """The routing weights (N, 1) in expert order; float32 where x is in half precision, so that none is rounded."""
    return weights.reshape(-1, 1)[slots].to(torch.promote_types(x.dtype, torch.float32))


def _weigh(y_nD: Tensor, gates_n1: Tensor, wide: Scratch) -> Tensor:
    """y · gate in the dtype of the gates: in place where y has that dtype, else in a buffer of `wide`."""
    if y_nD.dtype == gates_n1.dtype:
        return y_nD.mul_(gates_n1)
    return torch.mul(y_nD, gates_n1, out=wide.rows("weighed", *y_nD.shape))


def _halves(kept: Tensor, width: int, gated: bool) -> list[Tensor]:
    """The layout of a kept z (N, F) or (N, 2F): gates first and values after them, each (N, F) without gaps.

    On rows with gaps an activation takes several times as long.
    """
    return list(kept.view(2, -1, width).unbind(0)) if gated else [kept]


def _buffers(scratch: Scratch, count: int, width: int) -> list[Tensor]:
    return [scratch.rows("z", count, width), scratch.rows("value", count, width)]


def _hidden(
    x: Tensor, up: Tensor, bias: Tensor | None, width: int, gated: bool, into: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Computes the gate and the value of a gated expert; of another expert the hidden layer and None."""
    if not gated:
        return _linear(x, up, bias, into[0]), None
    gate_bias, value_bias = (None, None) if bias is None else bias.split(width)
    return _linear(x, up[:width], gate_bias, into[0]), _linear(x, up[width:], value_bias, into[1])


def mlp_forward(
    x: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, keep_hidden: bool = False
) -> tuple[Tensor, ...]:
    """See `mome_kernels.moe_mlp`.

    Also returns z in expert order with `keep_hidden`, else an empty tensor, and three empty tensors in place of the
    order that the kernels keep.
    """
    up, up_bias, down, down_bias, activation, gated = experts
    width = experts.hidden_width
    kept = x.new_empty((ids.numel(), experts.up_width) if keep_hidden else 0)
    order = [x.new_empty(0, dtype=torch.int32) for _ in AssignmentOrder._fields]
    if not ids.numel():
        return x.new_zeros(x.shape[0], experts.out_width), kept, *order
    blocks = ExpertBlocks(ids, experts.num_experts, experts.up_width * x.element_size())
    gates_N1 = _gates(weights, blocks.slots, x)
    # what is kept for the backward pass has exactly the rows that there are
    size_of = (lambda count, _: count) if keep_hidden else _padded
    scratch, wide = Scratch(x, size_of(blocks.largest, x)), Scratch(gates_N1, blocks.largest)
    out_TD = blocks.new_output(gates_N1, experts.out_width)
    ups, downs = up.unbind(0), down.unbind(0)
    for e, rows, tokens, _ in blocks:
        taken = tokens.shape[0]
        n = size_of(taken, x)
        part = scratch.rows("x", n, x.shape[1])
        torch.index_select(x, 0, tokens, out=part[:taken])
        part[taken:].zero_()
        halves = [half[rows] for half in _halves(kept, width, gated)] if keep_hidden else []
        first, value = _hidden(part, ups[e], _of(up_bias, e), width, gated, halves or _buffers(scratch, n, width))
        h = activate(first, activation, scratch.rows("h", n, width) if keep_hidden else first)
        if value is not None:
            h = torch.mul(h, value, out=scratch.rows("h", n, width))
        y = _linear(h, downs[e], _of(down_bias, e), scratch.rows("y", n, down.shape[1]))[:taken]
        blocks.add_rows(out_TD, tokens, _weigh(y, gates_N1[rows], wide))
    return out_TD.to(x.dtype), kept, *order


def mlp_backward(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, experts: ExpertWeights, hidden: Tensor | None = None,
    *_: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, weights, up, up_bias, down, down_bias; that of an absent bias is an empty tensor.

    `hidden` is the z that the forward pass kept; where it is None or empty, z is computed again. The rows are sorted
    again, too.
    """
    up, up_bias, down, down_bias, activation, gated = experts
    width = experts.hidden_width
    blocks = ExpertBlocks(ids, experts.num_experts, experts.up_width * x.element_size())
    gates_N1 = _gates(weights, blocks.slots, x)
    scratch, wide = Scratch(x, blocks.largest), Scratch(gates_N1, blocks.largest)
    d_up, d_down = _GradientSum(up, blocks.counts), _GradientSum(down, blocks.counts)
    d_up_bias = None if up_bias is None else _GradientSum(up_bias, blocks.counts)
    d_down_bias = None if down_bias is None else _GradientSum(down_bias, blocks.counts)
    d_weights_N = gates_N1.new_zeros(ids.numel())
    d_x = blocks.new_output(gates_N1, x.shape[1]) if ids.numel() else x.new_zeros(x.shape)
    ups, downs = up.unbind(0), down.unbind(0)
    for e, rows, tokens, is_first in blocks:
        n, gate = tokens.shape[0], gates_N1[rows]
        part = torch.index_select(x, 0, tokens, out=scratch.rows("x", n, x.shape[1]))
        dy = torch.index_select(grad, 0, tokens, out=scratch.rows("dy", n, grad.shape[1]))
        if hidden is not None and hidden.numel():
            z, *values = [half[rows] for half in _halves(hidden, width, gated)]
            value = values[0] if gated else None
        else:
            z, value = _hidden(part, ups[e], _of(up_bias, e), width, gated, _buffers(scratch, n, width))
        dh = torch.mm(dy, downs[e], out=scratch.rows("dh", n, width))
        a = activate(z, activation, scratch.rows("a", n, width))
        h = a if value is None else torch.mul(a, value, out=scratch.rows("h", n, width))
        d_weight = d_weights_N[rows]
        if down_bias is not None:
            d_weight.copy_(torch.mv(dy, down_bias[e]))
        d_down.add_product(e, dy.mul_(gate).t(), h, is_first)
        if d_down_bias is not None:
            d_down_bias.add_row_sum(e, dy, is_first)
        # ⟨dy, W₂ h⟩ = ⟨W₂ᵀ dy, h⟩, so that the expert's output is not computed again
        product = torch.mul(dh, h, out=scratch.rows("h", n, width) if h is z else h)
        d_weight += product.sum(-1, dtype=d_weight.dtype)
        d_hidden = [(dh, slice(0, width))]  # the gradient of z, and the rows of W₁ that made it
        if value is not None:
            d_value = torch.mul(dh, a, out=scratch.rows("d_value", n, width))
            d_hidden = [(torch.mul(dh, value, out=dh), slice(0, width)), (d_value, slice(width, 2 * width))]
        activate_backward(dh, z, activation)
        part.mul_(gate)
        for dz, columns in d_hidden:
            if d_up_bias is not None:
                weighted = torch.mul(dz, gate, out=scratch.rows("weighted dz", *dz.shape))
                d_up_bias.add_row_sum(e, weighted, is_first, columns)
            d_up.add_product(e, dz.t(), part, is_first, columns)
        back = torch.mm(dh, ups[e][:width], out=part)
        if value is not None:
            back.addmm_(d_value, ups[e][width:])
        blocks.add_rows(d_x, tokens, _weigh(back, gate, wide))
    return (
        d_x.to(x.dtype),
        _in_slot_order(d_weights_N, blocks.slots, weights),
        d_up.result(),
        x.new_zeros(0) if d_up_bias is None else d_up_bias.result(),
        d_down.result(),
        x.new_zeros(0) if d_down_bias is None else d_down_bias.result(),
    )


def linear_forward(x: Tensor, ids: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `mome_kernels.moe_linear`."""
    if not ids.numel():
        return x.new_zeros(x.shape[0], weight.shape[1])
    blocks = ExpertBlocks(ids, weight.shape[0], weight.shape[1] * x.element_size())
    gates_N1, matrices = _gates(weights, blocks.slots, x), weight.unbind(0)
    scratch, wide = Scratch(x, blocks.largest), Scratch(gates_N1, blocks.largest)
    out_TF = blocks.new_output(gates_N1, weight.shape[1])
    for e, rows, tokens, _ in blocks:
        n = tokens.shape[0]
        part = torch.index_select(x, 0, tokens, out=scratch.rows("x", n, x.shape[1]))
        y = _linear(part, matrices[e], _of(bias, e), scratch.rows("y", n, weight.shape[1]))
        blocks.add_rows(out_TF, tokens, _weigh(y, gates_N1[rows], wide))
    return out_TF.to(x.dtype)


def linear_backward(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of x, weights, weight, bias; that of an absent bias is an empty tensor."""
    blocks = ExpertBlocks(ids, weight.shape[0], weight.shape[1] * x.element_size())
    gates_N1, matrices = _gates(weights, blocks.slots, x), weight.unbind(0)
    scratch, wide = Scratch(x, blocks.largest), Scratch(gates_N1, blocks.largest)
    d_weight, d_weights_N = _GradientSum(weight, blocks.counts), gates_N1.new_empty(ids.numel())
    d_bias = None if bias is None else _GradientSum(bias, blocks.counts)
    d_x = blocks.new_output(gates_N1, x.shape[1]) if ids.numel() else x.new_zeros(x.shape)
    for e, rows, tokens, is_first in blocks:
        n, gate = tokens.shape[0], gates_N1[rows]
        part = torch.index_select(x, 0, tokens, out=scratch.rows("x", n, x.shape[1]))
        dy = torch.index_select(grad, 0, tokens, out=scratch.rows("dy", n, grad.shape[1]))
        back = torch.mm(dy, matrices[e], out=scratch.rows("dx", n, x.shape[1]))
        product = torch.mul(back, part, out=scratch.rows("product", n, x.shape[1]))
        torch.sum(product, -1, dtype=d_weights_N.dtype, out=d_weights_N[rows])
        if bias is not None:
            d_weights_N[rows] += dy @ bias[e]
        d_weight.add_product(e, dy.mul_(gate).t(), part, is_first)
        if d_bias is not None:
            d_bias.add_row_sum(e, dy, is_first)
        blocks.add_rows(d_x, tokens, _weigh(back, gate, wide))
    return (
        d_x.to(x.dtype),
        _in_slot_order(d_weights_N, blocks.slots, weights),
        d_weight.result(),
        x.new_zeros(0) if d_bias is None else d_bias.result(),
    )
