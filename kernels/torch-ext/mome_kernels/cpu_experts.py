"""Expert layers on the CPU: tokens sorted by expert, worked on in blocks that stay in cache.

Of the intermediates at most z, the hidden layer before its activation, is kept for backward. A gate scales its row at
the narrow ends of the network only: all that lies between is linear in it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks
from .cpu_scratch import Scratch

_BLOCK_BYTES = 4 << 20  # hidden activations of one block


def route(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts (E,), offsets (E + 1,), permutation (N,) and its inverse; see `mome_kernels.route`."""
    flat = expert_ids_TK.reshape(-1)
    counts, permutation = _sorted(flat, num_experts)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=flat.device)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return counts.int(), offsets.int(), permutation, inverse


def _sorted(ids_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Counts (E,), and the stable order of the assignments by expert (N,)."""
    if ids_N.device.type == "cpu":
        checks.ids_in_range(ids_N, num_experts)
        counts = torch.bincount(ids_N, minlength=num_experts)
    else:  # bincount asks the host for the largest id; adding ones does not, and integers add in any order alike
        counts = torch.zeros(num_experts, dtype=torch.int64, device=ids_N.device)
        counts.scatter_add_(0, ids_N.long(), torch.ones_like(ids_N, dtype=torch.int64))
    # narrow keys sort several times faster than int64
    keys = ids_N.to(torch.int16) if num_experts < 32768 else ids_N
    return counts, torch.sort(keys, stable=True).indices


class _Plan:
    """Assignments in expert order, cut into blocks of one expert each."""

    def __init__(self, ids_TK: Tensor, num_experts: int, row_bytes: int) -> None:
        counts, self.slots = _sorted(ids_TK.reshape(-1), num_experts)
        self.counts = counts.tolist()
        self.share = ids_TK.shape[1]
        self.tokens = self.slots if self.share == 1 else torch.div(self.slots, self.share, rounding_mode="floor")
        size = max(512, _BLOCK_BYTES // max(1, row_bytes))
        self.blocks = [-(-count // size) for count in self.counts]  # of about one size: a small rest would be slow
        pairs = zip(self.counts, self.blocks, strict=True)
        self.largest = max((-(-count // blocks) for count, blocks in pairs if blocks), default=0)

    def __iter__(self) -> Iterator[tuple[int, slice, Tensor, bool]]:
        """(expert, rows, their tokens, whether they are the expert's first) of every block, expert after expert."""
        start = 0
        for expert, (count, blocks) in enumerate(zip(self.counts, self.blocks, strict=True)):
            for block in range(blocks):
                rows = slice(start + count * block // blocks, start + count * (block + 1) // blocks)
                yield expert, rows, self.tokens[rows], block == 0
            start += count

    def target(self, like: Tensor, width: int) -> Tensor:
        """(T, width) to `put` rows in."""
        tokens = self.tokens.numel() // max(1, self.share)
        # with one expert per token, every row is written
        return like.new_empty(tokens, width) if self.share == 1 else like.new_zeros(tokens, width)

    def put(self, out_TD: Tensor, tokens_n: Tensor, y_nD: Tensor) -> None:
        """Adds rows to their tokens, one expert after the other: the order of the sums is fixed."""
        if self.share == 1:
            out_TD.index_copy_(0, tokens_n, y_nD)
        elif out_TD.device.type == "cpu":
            out_TD.index_add_(0, tokens_n, y_nD)
        else:  # sorts the index first, unlike index_add, which adds atomically
            out_TD.index_put_((tokens_n,), y_nD, accumulate=True)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """x @ weight.T + bias."""
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


class _Sum:
    """A parameter's gradient, expert by expert; float32 for half precision, which would lose the small blocks."""

    def __init__(self, parameter: Tensor, counts: list[int]) -> None:
        wide = torch.promote_types(parameter.dtype, torch.float32)
        self.dtype = parameter.dtype
        self.total = torch.empty_like(parameter, dtype=wide, memory_format=torch.contiguous_format)
        for expert, count in enumerate(counts):
            if not count:
                self.total[expert].zero_()

    def add(self, expert: int, a: Tensor, b: Tensor, first: bool) -> None:
        """total[expert] = a @ b with its first block, total[expert] += a @ b with the others."""
        into = self.total[expert]
        if into.dtype != a.dtype:
            self.add_rows(expert, (a @ b)[None], first)
        elif first:
            torch.mm(a, b, out=into)
        else:
            into.addmm_(a, b)

    def add_rows(self, expert: int, rows: Tensor, first: bool) -> None:
        """The same with the sum of rows; `sum` adds pairwise, a product with a vector of ones would not."""
        total = rows.sum(0, dtype=self.total.dtype)
        if first:
            self.total[expert] = total
        else:
            self.total[expert] += total

    def result(self) -> Tensor:
        return self.total.to(self.dtype)


def activate(z_nF: Tensor, activation: str, out: Tensor) -> Tensor:
    """a(z) into `out`, which may be z itself; z where there is no activation."""
    if activation == "silu":
        return torch.ops.aten.silu.out(z_nF, out=out)
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(z_nF, approximate=_approximation(activation), out=out)
    return torch.clamp_min(z_nF, 0, out=out) if activation == "relu" else z_nF


def _activate_backward(grad_nF: Tensor, z_nF: Tensor, activation: str) -> Tensor:
    """grad · a'(z), in place."""
    if activation == "silu":
        return torch.ops.aten.silu_backward.grad_input(grad_nF, z_nF, grad_input=grad_nF)
    if activation in ("gelu", "gelu_tanh"):
        approximate = _approximation(activation)
        return torch.ops.aten.gelu_backward.grad_input(grad_nF, z_nF, approximate=approximate, grad_input=grad_nF)
    if activation == "relu":
        return torch.ops.aten.threshold_backward.grad_input(grad_nF, z_nF, 0, grad_input=grad_nF)
    return grad_nF


def _approximation(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"


def mlp_forward(
    x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, gated: bool, keep_hidden: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `mome_kernels.moe_mlp`; also z in expert order where it is kept, else an empty tensor."""
    kept = x.new_empty((ids.numel(), up.shape[1]) if keep_hidden else 0)
    if not ids.numel():
        return x.new_zeros(x.shape[0], down.shape[1]), kept
    plan, width = _Plan(ids, up.shape[0], up.shape[1] * x.element_size()), down.shape[2]
    scratch = Scratch(x, plan.largest)
    out_TD = plan.target(x, down.shape[1])
    gates_N1 = gates.reshape(-1, 1)[plan.slots].to(x.dtype)
    ups, downs = up.unbind(0), down.unbind(0)
    for e, rows, tokens, _ in plan:
        n = tokens.shape[0]
        part = torch.index_select(x, 0, tokens, out=scratch.rows("x", n, x.shape[1]))
        z = kept[rows] if keep_hidden else scratch.rows("z", n, up.shape[1])
        _linear(part, ups[e], None if up_bias is None else up_bias[e], z)
        first = z[:, :width] if gated else z
        h = activate(first, activation, scratch.rows("h", n, width) if keep_hidden else first)
        if gated:
            h = torch.mul(h, z[:, width:], out=scratch.rows("h", n, width))
        y = _linear(h, downs[e], None if down_bias is None else down_bias[e], scratch.rows("y", n, down.shape[1]))
        plan.put(out_TD, tokens, y.mul_(gates_N1[rows]))
    return out_TD, kept


def mlp_backward(
    grad: Tensor, x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, gated: bool, kept: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, gates, up, up_bias, down, down_bias; biases that are absent give empty tensors."""
    plan, width = _Plan(ids, up.shape[0], up.shape[1] * x.element_size()), down.shape[2]
    scratch = Scratch(x, plan.largest)
    d_up, d_down = _Sum(up, plan.counts), _Sum(down, plan.counts)
    d_up_bias = None if up_bias is None else _Sum(up_bias, plan.counts)
    d_down_bias = None if down_bias is None else _Sum(down_bias, plan.counts)
    d_gates_N = x.new_zeros(ids.numel())
    d_x = plan.target(x, x.shape[1]) if ids.numel() else x.new_zeros(x.shape)
    gates_N1 = gates.reshape(-1, 1)[plan.slots].to(x.dtype)
    ups, downs = up.unbind(0), down.unbind(0)
    for e, rows, tokens, first in plan:
        n, gate = tokens.shape[0], gates_N1[rows]
        part = torch.index_select(x, 0, tokens, out=scratch.rows("x", n, x.shape[1]))
        dy = torch.index_select(grad, 0, tokens, out=scratch.rows("dy", n, grad.shape[1]))
        if kept is not None and kept.numel():
            z = kept[rows]
        else:
            z = _linear(part, ups[e], None if up_bias is None else up_bias[e], scratch.rows("z", n, up.shape[1]))
        z, value = (z[:, :width], z[:, width:]) if gated else (z, None)
        dh = torch.mm(dy, downs[e], out=scratch.rows("dh", n, width))
        a = activate(z, activation, scratch.rows("a", n, width))
        h = a if value is None else torch.mul(a, value, out=scratch.rows("h", n, width))
        d_gate = d_gates_N[rows]
        if down_bias is not None:
            torch.mv(dy, down_bias[e], out=d_gate)
        d_down.add(e, dy.mul_(gate).t(), h, first)
        if d_down_bias is not None:
            d_down_bias.add_rows(e, dy, first)
        # ⟨dy, W₂ h⟩ = ⟨W₂ᵀ dy, h⟩: the expert's output is not needed again
        d_gate += torch.mul(dh, h, out=scratch.rows("h", n, width) if h is z else h).sum(-1)
        dz = dh
        if value is not None:
            dz = scratch.rows("dz", n, up.shape[1])
            torch.mul(dh, value, out=dz[:, :width])
            torch.mul(dh, a, out=dz[:, width:])
        _activate_backward(dz[:, :width], z, activation)
        if d_up_bias is not None:
            d_up_bias.add_rows(e, torch.mul(dz, gate, out=scratch.rows("gated dz", *dz.shape)), first)
        d_up.add(e, dz.t(), part.mul_(gate), first)
        plan.put(d_x, tokens, torch.mm(dz, ups[e], out=part).mul_(gate))
    return (
        d_x,
        _back_in_order(d_gates_N, plan.slots, gates),
        d_up.result(),
        x.new_zeros(0) if d_up_bias is None else d_up_bias.result(),
        d_down.result(),
        x.new_zeros(0) if d_down_bias is None else d_down_bias.result(),
    )


def _back_in_order(d_gates_N: Tensor, slots: Tensor, gates: Tensor) -> Tensor:
    d_gates = torch.empty_like(gates.reshape(-1))
    d_gates[slots] = d_gates_N.to(d_gates.dtype)
    return d_gates.view_as(gates)


def linear_forward(x: Tensor, ids: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `mome_kernels.moe_linear`."""
    if not ids.numel():
        return x.new_zeros(x.shape[0], weight.shape[1])
    plan = _Plan(ids, weight.shape[0], weight.shape[1] * x.element_size())
    scratch = Scratch(x, plan.largest)
    out_TF = plan.target(x, weight.shape[1])
    gates_N1, matrices = gates.reshape(-1, 1)[plan.slots].to(x.dtype), weight.unbind(0)
    for e, rows, tokens, _ in plan:
        n = tokens.shape[0]
        part = torch.index_select(x, 0, tokens, out=scratch.rows("x", n, x.shape[1]))
        y = _linear(part, matrices[e], None if bias is None else bias[e], scratch.rows("y", n, weight.shape[1]))
        plan.put(out_TF, tokens, y.mul_(gates_N1[rows]))
    return out_TF


def linear_backward(
    grad: Tensor, x: Tensor, ids: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of x, gates, weight, bias."""
    plan = _Plan(ids, weight.shape[0], weight.shape[1] * x.element_size())
    scratch = Scratch(x, plan.largest)
    d_weight, d_gates_N = _Sum(weight, plan.counts), x.new_empty(ids.numel())
    d_bias = None if bias is None else _Sum(bias, plan.counts)
    d_x = plan.target(x, x.shape[1]) if ids.numel() else x.new_zeros(x.shape)
    gates_N1, matrices = gates.reshape(-1, 1)[plan.slots].to(x.dtype), weight.unbind(0)
    for e, rows, tokens, first in plan:
        n, gate = tokens.shape[0], gates_N1[rows]
        part = torch.index_select(x, 0, tokens, out=scratch.rows("x", n, x.shape[1]))
        dy = torch.index_select(grad, 0, tokens, out=scratch.rows("dy", n, grad.shape[1]))
        back = torch.mm(dy, matrices[e], out=scratch.rows("dx", n, x.shape[1]))
        torch.sum(torch.mul(back, part, out=scratch.rows("product", n, x.shape[1])), -1, out=d_gates_N[rows])
        if bias is not None:
            d_gates_N[rows] += dy @ bias[e]
        d_weight.add(e, dy.mul_(gate).t(), part, first)
        if d_bias is not None:
            d_bias.add_rows(e, dy, first)
        plan.put(d_x, tokens, back.mul_(gate))
    return (
        d_x,
        _back_in_order(d_gates_N, plan.slots, gates),
        d_weight.result(),
        x.new_zeros(0) if d_bias is None else d_bias.result(),
    )
