"""Expert layers on the CPU: tokens sorted by expert, worked on in blocks; no intermediate is kept for backward."""

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


def _blocks(ids_TK: Tensor, num_experts: int, row_bytes: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, tokens, slots) of every block of assignments, expert after expert."""
    counts, _, permutation, _ = route(ids_TK, num_experts)
    tokens = torch.div(permutation, ids_TK.shape[1], rounding_mode="floor")
    size = max(64, _BLOCK_BYTES // max(1, row_bytes))
    start = 0
    for expert, count in enumerate(counts.tolist()):
        for low in range(start, start + count, size):
            high = min(low + size, start + count)
            yield expert, tokens[low:high], permutation[low:high]
        start += count


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


def _add_rows(out_TD: Tensor, tokens: Tensor, rows_nD: Tensor) -> None:
    """A block's tokens are all different, so a plain indexed addition is right and deterministic."""
    out_TD.index_add_(0, tokens, rows_nD)


def mlp_forward(
    x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, gated: bool, keep_hidden: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `mome_kernels.moe_mlp`; the hidden layer is never kept here, so the second tensor is empty."""
    out = x.new_zeros(x.shape[0], down.shape[1])
    ups, downs, gate_of = up.unbind(0), down.unbind(0), gates.reshape(-1)
    for e, tokens, slots in _blocks(ids, up.shape[0], up.shape[1] * x.element_size()):
        z = F.linear(x.index_select(0, tokens), ups[e], None if up_bias is None else up_bias[e])
        if gated:
            g, u = z.chunk(2, dim=-1)
            h = activate(g, activation) * u
        else:
            h = activate(z, activation)
        y = F.linear(h, downs[e], None if down_bias is None else down_bias[e])
        _add_rows(out, tokens, y * gate_of[slots, None].to(y.dtype))
    return out, x.new_empty(0)


def mlp_backward(
    grad: Tensor, x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, gated: bool, hidden: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, gates, up, up_bias, down, down_bias; biases that are absent give empty tensors."""
    d_x, d_gates = torch.zeros_like(x), torch.zeros_like(gates)
    d_up, d_down = torch.zeros_like(up), torch.zeros_like(down)
    d_up_bias = x.new_zeros(0) if up_bias is None else torch.zeros_like(up_bias)
    d_down_bias = x.new_zeros(0) if down_bias is None else torch.zeros_like(down_bias)
    ups, downs, gate_of, d_gate_of = up.unbind(0), down.unbind(0), gates.reshape(-1), d_gates.view(-1)
    for e, tokens, slots in _blocks(ids, up.shape[0], up.shape[1] * x.element_size()):
        rows = x.index_select(0, tokens)
        z = F.linear(rows, ups[e], None if up_bias is None else up_bias[e])
        if gated:
            g, u = z.chunk(2, dim=-1)
            a = activate(g, activation)
            h = a * u
        else:
            h = activate(z, activation)
        dy = grad.index_select(0, tokens)
        dh_ungated = dy @ downs[e]  # ⟨dy, W₂ h⟩ = ⟨W₂ᵀ dy, h⟩: the expert's output is not needed again
        d_gate = (dh_ungated * h).sum(-1)
        if down_bias is not None:
            d_gate = d_gate + dy @ down_bias[e]
        d_gate_of[slots] = d_gate.to(d_gate_of.dtype)
        gate = gate_of[slots, None].to(dy.dtype)
        dy = dy * gate
        dh = dh_ungated * gate
        d_down[e] += dy.t() @ h
        if down_bias is not None:
            d_down_bias[e] += dy.sum(0)
        if gated:
            dz = torch.cat([_activate_backward(dh * u, g, activation), dh * a], dim=-1)
        else:
            dz = _activate_backward(dh, z, activation)
        d_up[e] += dz.t() @ rows
        if up_bias is not None:
            d_up_bias[e] += dz.sum(0)
        _add_rows(d_x, tokens, dz @ ups[e])
    return d_x, d_gates, d_up, d_up_bias, d_down, d_down_bias


def linear_forward(x: Tensor, ids: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `mome_kernels.moe_linear`."""
    out = x.new_zeros(x.shape[0], weight.shape[1])
    matrices, gate_of = weight.unbind(0), gates.reshape(-1)
    for e, tokens, slots in _blocks(ids, weight.shape[0], weight.shape[1] * x.element_size()):
        y = F.linear(x.index_select(0, tokens), matrices[e], None if bias is None else bias[e])
        _add_rows(out, tokens, y * gate_of[slots, None].to(y.dtype))
    return out


def linear_backward(
    grad: Tensor, x: Tensor, ids: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of x, gates, weight, bias."""
    d_x, d_gates, d_weight = torch.zeros_like(x), torch.zeros_like(gates), torch.zeros_like(weight)
    d_bias = x.new_zeros(0) if bias is None else torch.zeros_like(bias)
    matrices, gate_of, d_gate_of = weight.unbind(0), gates.reshape(-1), d_gates.view(-1)
    for e, tokens, slots in _blocks(ids, weight.shape[0], weight.shape[1] * x.element_size()):
        rows, dy = x.index_select(0, tokens), grad.index_select(0, tokens)
        back = dy @ matrices[e]
        d_gate = (back * rows).sum(-1)
        if bias is not None:
            d_gate = d_gate + dy @ bias[e]
        d_gate_of[slots] = d_gate.to(d_gate_of.dtype)
        gate = gate_of[slots, None].to(dy.dtype)
        dy = dy * gate
        d_weight[e] += dy.t() @ rows
        if bias is not None:
            d_bias[e] += dy.sum(0)
        _add_rows(d_x, tokens, back * gate)
    return d_x, d_gates, d_weight, d_bias
