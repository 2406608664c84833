"""Expert layers on the CPU: tokens sorted by expert, worked on in blocks that stay in cache.

Of the intermediates at most z, the hidden layer before its activation, is kept for backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks

_BLOCK_BYTES = 2 << 20  # hidden activations of one block


def route(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts (E,), offsets (E + 1,), permutation (N,) and its inverse; see `mome_kernels.route`."""
    flat = expert_ids_TK.reshape(-1)
    if flat.device.type == "cpu":
        checks.ids_in_range(flat, num_experts)
    # narrow keys sort several times faster than int64
    keys = flat.to(torch.int16) if num_experts < 32768 else flat
    permutation = torch.sort(keys, stable=True).indices
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=flat.device)
    if flat.device.type == "cpu":
        counts = torch.bincount(flat, minlength=num_experts)
    else:  # bincount asks the host for the largest id; adding ones does not, and integers add in any order alike
        counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
        counts.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int64))
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return counts.int(), offsets.int(), permutation, inverse


class _Plan:
    """Assignments in expert order, cut into blocks of one expert each."""

    def __init__(self, ids_TK: Tensor, num_experts: int, row_bytes: int) -> None:
        self.counts, _, self.slots, self.inverse = route(ids_TK, num_experts)
        self.share = ids_TK.shape[1]
        self.tokens = torch.div(self.slots, self.share, rounding_mode="floor")
        self.size = max(512, _BLOCK_BYTES // max(1, row_bytes))

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """(expert, rows) of every block, expert after expert."""
        start = 0
        for expert, count in enumerate(self.counts.tolist()):
            for low in range(start, start + count, self.size):
                yield expert, slice(low, min(low + self.size, start + count))
            start += count

    def combine(self, y_ND: Tensor) -> Tensor:
        """Sums each token's rows: gathers read in token order, and the sum's order is fixed."""
        slots_TK = self.inverse.view(-1, self.share)
        out_TD = y_ND.index_select(0, slots_TK[:, 0])
        for k in range(1, self.share):
            out_TD += y_ND.index_select(0, slots_TK[:, k])
        return out_TD


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, into `out` where given."""
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _sums_like(parameter: Tensor) -> Tensor:
    """Zeros to add up a gradient in: float32 for half precision, which would lose the small blocks."""
    return torch.zeros_like(
        parameter, dtype=torch.promote_types(parameter.dtype, torch.float32), memory_format=torch.contiguous_format
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def activate(z_nF: Tensor, activation: str) -> Tensor:
    """a(z)."""
    if activation == "silu":
        return F.silu(z_nF)
    if activation == "gelu":
        return F.gelu(z_nF)
    if activation == "gelu_tanh":
        return F.gelu(z_nF, approximate="tanh")
    return F.relu(z_nF) if activation == "relu" else z_nF


def _activate_backward(grad_nF: Tensor, z_nF: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad_nF, z_nF)
    if activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_backward(grad_nF, z_nF, approximate=approximate)
    return grad_nF * (z_nF > 0) if activation == "relu" else grad_nF


def mlp_forward(
    x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, gated: bool, keep_hidden: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `mome_kernels.moe_mlp`; also z in expert order where it is kept, else an empty tensor."""
    plan = _Plan(ids, up.shape[0], up.shape[1] * x.element_size())
    hidden = x.new_empty(ids.numel() if keep_hidden else 0, up.shape[1] if keep_hidden else 0)
    if not ids.numel():
        return x.new_zeros(x.shape[0], down.shape[1]), hidden if keep_hidden else x.new_empty(0)
    y_ND = x.new_empty(ids.numel(), down.shape[1])
    gates_N = gates.reshape(-1)[plan.slots].to(x.dtype)
    ups, downs = up.unbind(0), down.unbind(0)
    for e, rows in plan:
        part = x.index_select(0, plan.tokens[rows])
        z = _linear(part, ups[e], None if up_bias is None else up_bias[e], hidden[rows] if keep_hidden else None)
        if gated:
            g, u = z.chunk(2, dim=-1)
            h = activate(g, activation) * u
        else:
            h = activate(z, activation)
        y = _linear(h, downs[e], None if down_bias is None else down_bias[e], y_ND[rows])
        y.mul_(gates_N[rows, None])
    return plan.combine(y_ND), hidden if keep_hidden else x.new_empty(0)


def mlp_backward(
    grad: Tensor, x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, gated: bool, hidden: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, gates, up, up_bias, down, down_bias; biases that are absent give empty tensors."""
    plan = _Plan(ids, up.shape[0], up.shape[1] * x.element_size())
    d_up, d_down, d_gates = _sums_like(up), _sums_like(down), torch.empty_like(gates.reshape(-1))
    d_up_bias = x.new_zeros(0) if up_bias is None else _sums_like(up_bias)
    d_down_bias = x.new_zeros(0) if down_bias is None else _sums_like(down_bias)
    d_rows = x.new_empty(ids.numel(), x.shape[1])
    gates_N = gates.reshape(-1)[plan.slots].to(x.dtype)
    ups, downs = up.unbind(0), down.unbind(0)
    for e, rows in plan:
        tokens = plan.tokens[rows]
        part, dy = x.index_select(0, tokens), grad.index_select(0, tokens)
        if hidden is not None and hidden.numel():
            z = hidden[rows]
        else:
            z = _linear(part, ups[e], None if up_bias is None else up_bias[e])
        if gated:
            g, u = z.chunk(2, dim=-1)
            a = activate(g, activation)
            h = a * u
        else:
            h = activate(z, activation)
        dh = dy @ downs[e]  # ⟨dy, W₂ h⟩ = ⟨W₂ᵀ dy, h⟩: the expert's output is not needed again
        d_gate = (dh * h).sum(-1)
        if down_bias is not None:
            d_gate = d_gate + dy @ down_bias[e]
        d_gates[plan.slots[rows]] = d_gate.to(d_gates.dtype)
        gate = gates_N[rows, None]
        dy.mul_(gate)
        dh.mul_(gate)
        _add_product(d_down[e], dy.t(), h)
        if down_bias is not None:
            d_down_bias[e] += dy.sum(0)
        if gated:
            dz = torch.empty_like(z)
            torch.mul(dh, a, out=dz[:, dh.shape[1] :])
            dz[:, : dh.shape[1]] = _activate_backward(dh.mul_(u), g, activation)
        else:
            dz = _activate_backward(dh, z, activation)
        _add_product(d_up[e], dz.t(), part)
        if up_bias is not None:
            d_up_bias[e] += dz.sum(0)
        torch.mm(dz, ups[e], out=d_rows[rows])
    d_x = plan.combine(d_rows) if ids.numel() else x.new_zeros(x.shape)
    return (
        d_x,
        d_gates.view_as(gates),
        d_up.to(up.dtype),
        d_up_bias.to(x.dtype),
        d_down.to(down.dtype),
        d_down_bias.to(x.dtype),
    )


def linear_forward(x: Tensor, ids: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `mome_kernels.moe_linear`."""
    if not ids.numel():
        return x.new_zeros(x.shape[0], weight.shape[1])
    plan = _Plan(ids, weight.shape[0], weight.shape[1] * x.element_size())
    y_NF = x.new_empty(ids.numel(), weight.shape[1])
    gates_N, matrices = gates.reshape(-1)[plan.slots].to(x.dtype), weight.unbind(0)
    for e, rows in plan:
        part = x.index_select(0, plan.tokens[rows])
        y = _linear(part, matrices[e], None if bias is None else bias[e], y_NF[rows])
        y.mul_(gates_N[rows, None])
    return plan.combine(y_NF)


def linear_backward(
    grad: Tensor, x: Tensor, ids: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of x, gates, weight, bias."""
    plan = _Plan(ids, weight.shape[0], weight.shape[1] * x.element_size())
    d_weight, d_gates = _sums_like(weight), torch.empty_like(gates.reshape(-1))
    d_bias = x.new_zeros(0) if bias is None else _sums_like(bias)
    d_rows = x.new_empty(ids.numel(), x.shape[1])
    gates_N, matrices = gates.reshape(-1)[plan.slots].to(x.dtype), weight.unbind(0)
    for e, rows in plan:
        tokens = plan.tokens[rows]
        part, dy = x.index_select(0, tokens), grad.index_select(0, tokens)
        back = torch.mm(dy, matrices[e], out=d_rows[rows])
        d_gate = (back * part).sum(-1)
        if bias is not None:
            d_gate = d_gate + dy @ bias[e]
        d_gates[plan.slots[rows]] = d_gate.to(d_gates.dtype)
        gate = gates_N[rows, None]
        dy.mul_(gate)
        back.mul_(gate)
        _add_product(d_weight[e], dy.t(), part)
        if bias is not None:
            d_bias[e] += dy.sum(0)
    d_x = plan.combine(d_rows) if ids.numel() else x.new_zeros(x.shape)
    return d_x, d_gates.view_as(gates), d_weight.to(weight.dtype), d_bias.to(x.dtype)
