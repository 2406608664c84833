"""Row-wise kernels around the grouped matrix products: the weighted sum of a token's rows, the derivative of the
activation, and the gradients of routing weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, activate_slope
from .launch import Launch, ceil_div, power_of_two


@triton.jit(do_not_specialize=["T"])
def _combine(y, weights_TK, inverse, out, T, D, BLOCKS_D, PER_TOKEN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """out[t] = Σ_k weight[t, k] · y[inverse[t·K + k]], summed in float32 in the order of k."""
    pid = tl.program_id(0)
    t = (pid // BLOCKS_D) * BT + tl.arange(0, BT)
    d = (pid % BLOCKS_D) * BD + tl.arange(0, BD)
    live = t < T
    keep = live[:, None] & (d < D)[None, :]
    acc = tl.zeros([BT, BD], tl.float32)
    for k in range(PER_TOKEN):
        slot = t.to(tl.int64) * PER_TOKEN + k
        row = tl.load(inverse + slot, mask=live, other=0).to(tl.int64)
        value = tl.load(y + row[:, None] * D + d[None, :], mask=keep, other=0.0).to(tl.float32)
        if weights_TK is not None:
            value *= tl.load(weights_TK + slot, mask=live, other=0.0).to(tl.float32)[:, None]
        acc += value
    tl.store(out + t.to(tl.int64)[:, None] * D + d[None, :], acc, mask=keep)


def plan_combine(y: Tensor, weights_TK: Tensor | None, inverse: Tensor, per_token: int, out: Tensor) -> Launch:
    """A launch that sums y (N, D) in expert order into out (T, D), times the routing weights where they are given."""
    t, d = out.shape
    bd = min(128, max(16, power_of_two(d)))
    bt = max(1, 2048 // bd)
    blocks = ceil_div(d, bd)
    arguments = {
        "y": y, "weights_TK": weights_TK, "inverse": inverse, "out": out, "T": t, "D": d, "BLOCKS_D": blocks,
        "PER_TOKEN": per_token, "BT": bt, "BD": bd,
    }  # fmt: skip
    return Launch(_combine, (ceil_div(t, bt) * blocks,), arguments)


@triton.jit
def _bias_dot(grad, bias, token, e, live, D, BM: tl.constexpr, BD: tl.constexpr):
    """⟨grad[token], bias[e]⟩ of every row."""
    total = tl.zeros([BM], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        keep = live[:, None] & (d < D)[None, :]
        g = tl.load(grad + token[:, None] * D + d[None, :], mask=keep, other=0.0).to(tl.float32)
        b = tl.load(bias + e[:, None] * D + d[None, :], mask=keep, other=0.0).to(tl.float32)
        total += tl.sum(g * b, axis=1)
    return total


@triton.jit(do_not_specialize=["N"])
def _activation_backward(
    dh, z, h, dz, grad, bias, ids, slots, weights_TK, d_weights_TK, N, F, D, PER_TOKEN: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """From z and dh (N, F): h, dz times the routing weight, and the weight's gradient ⟨dh, h⟩ + ⟨grad, bias⟩."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = row < N
    slot = tl.load(slots + row, mask=live, other=0).to(tl.int64)
    weight = tl.load(weights_TK + slot, mask=live, other=0.0).to(tl.float32)
    row64 = row.to(tl.int64)
    width = 2 * F if GATED else F
    total = tl.zeros([BM], tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        keep = live[:, None] & (f < F)[None, :]
        at = row64[:, None] * F + f[None, :]
        wide = row64[:, None] * width + f[None, :]
        back = tl.load(dh + at, mask=keep, other=0.0).to(tl.float32)
        first = tl.load(z + wide, mask=keep, other=0.0).to(tl.float32)
        active = activate(first, ACT)
        slope = activate_slope(first, ACT)
        weighted = back * weight[:, None]
        if GATED:
            second = tl.load(z + wide + F, mask=keep, other=0.0).to(tl.float32)
            tl.store(dz + wide + F, weighted * active, mask=keep)
            slope = slope * second
            active = active * second
        tl.store(dz + wide, weighted * slope, mask=keep)
        tl.store(h + at, active, mask=keep)
        total += tl.sum(back * active, axis=1)
    if bias is not None:
        e = tl.load(ids + slot, mask=live, other=0).to(tl.int64)
        total += _bias_dot(grad, bias, slot // PER_TOKEN, e, live, D, BM, BD)
    tl.store(d_weights_TK + slot, total, mask=live)


def plan_activation_backward(
    dh: Tensor, z: Tensor, h: Tensor, dz: Tensor, grad: Tensor, bias: Tensor | None, ids: Tensor, slots: Tensor,
    weights_TK: Tensor, d_weights_TK: Tensor, activation: str, gated: bool,
) -> Launch:  # fmt: skip
    """A launch for rows in expert order.

    `grad` (T, D) and `bias` (E, D) give the bias's term in the gradient of the routing weights.
    """
    n, f = dh.shape
    bf, bd = min(256, max(16, power_of_two(f))), min(256, max(16, power_of_two(grad.shape[1])))
    bm = max(1, 2048 // max(bf, bd))
    arguments = {
        "dh": dh, "z": z, "h": h, "dz": dz, "grad": grad, "bias": bias, "ids": ids, "slots": slots,
        "weights_TK": weights_TK, "d_weights_TK": d_weights_TK, "N": n, "F": f, "D": grad.shape[1],
        "PER_TOKEN": ids.shape[1], "ACT": activation, "GATED": gated, "BM": bm, "BF": bf, "BD": bd,
    }  # fmt: skip
    return Launch(_activation_backward, (ceil_div(n, bm),), arguments)


@triton.jit(do_not_specialize=["N"])
def _row_dot(
    a, b, grad, bias, ids, slots, d_weights_TK, N, D, DG, PER_TOKEN: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """d_weights_TK[slot] = ⟨a[row], b[token]⟩ (+ ⟨grad[token], bias[expert]⟩)."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = row < N
    slot = tl.load(slots + row, mask=live, other=0).to(tl.int64)
    token = slot // PER_TOKEN
    row64 = row.to(tl.int64)
    total = tl.zeros([BM], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        keep = live[:, None] & (d < D)[None, :]
        left = tl.load(a + row64[:, None] * D + d[None, :], mask=keep, other=0.0).to(tl.float32)
        right = tl.load(b + token[:, None] * D + d[None, :], mask=keep, other=0.0).to(tl.float32)
        total += tl.sum(left * right, axis=1)
    if bias is not None:
        e = tl.load(ids + slot, mask=live, other=0).to(tl.int64)
        total += _bias_dot(grad, bias, token, e, live, DG, BM, BD)
    tl.store(d_weights_TK + slot, total, mask=live)


def plan_row_dot(
    a: Tensor, b: Tensor, grad: Tensor, bias: Tensor | None, ids: Tensor, slots: Tensor, d_weights_TK: Tensor
) -> Launch:
    """A launch for a (N, D) in expert order and b (T, D)."""
    n, d = a.shape
    bd = min(256, max(16, power_of_two(d)))
    bm = max(1, 2048 // bd)
    arguments = {
        "a": a, "b": b, "grad": grad, "bias": bias, "ids": ids, "slots": slots, "d_weights_TK": d_weights_TK,
        "N": n, "D": d, "DG": grad.shape[1], "PER_TOKEN": ids.shape[1], "BM": bm, "BD": bd,
    }  # fmt: skip
    return Launch(_row_dot, (ceil_div(n, bm),), arguments)


def combine(y: Tensor, weights_TK: Tensor | None, inverse: Tensor, tokens: int, per_token: int) -> Tensor:
    """The sum of every token's rows (T, D), in the dtype of y."""
    out = torch.empty(tokens, y.shape[1], dtype=y.dtype, device=y.device)
    plan_combine(y, weights_TK, inverse, per_token, out).run()
    return out


@triton.jit(do_not_specialize=["N"])
def _combine_backward(
    grad, y, weights_TK, inverse, dy, d_weights_TK, N, D, PER_TOKEN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):
    """For every slot: dy[row] = weight · grad[token], d_weight = ⟨grad[token], y[row]⟩."""
    slot = tl.program_id(0) * BM + tl.arange(0, BM)
    live = slot < N
    row = tl.load(inverse + slot, mask=live, other=0).to(tl.int64)
    weight = tl.load(weights_TK + slot, mask=live, other=0.0).to(tl.float32)
    token = slot.to(tl.int64) // PER_TOKEN
    total = tl.zeros([BM], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        keep = live[:, None] & (d < D)[None, :]
        g = tl.load(grad + token[:, None] * D + d[None, :], mask=keep, other=0.0).to(tl.float32)
        at = row[:, None] * D + d[None, :]
        total += tl.sum(g * tl.load(y + at, mask=keep, other=0.0).to(tl.float32), axis=1)
        tl.store(dy + at, g * weight[:, None], mask=keep)
    tl.store(d_weights_TK + slot, total, mask=live)


def plan_combine_backward(
    grad: Tensor, y: Tensor, weights_TK: Tensor, inverse: Tensor, dy: Tensor, d_weights_TK: Tensor
) -> Launch:
    """A launch for y (N, D) in expert order and grad (T, D)."""
    n, d = y.shape
    bd = min(256, max(16, power_of_two(d)))
    bm = max(1, 2048 // bd)
    arguments = {
        "grad": grad, "y": y, "weights_TK": weights_TK, "inverse": inverse, "dy": dy, "d_weights_TK": d_weights_TK,
        "N": n, "D": d, "PER_TOKEN": weights_TK.shape[1], "BM": bm, "BD": bd,
    }  # fmt: skip
    return Launch(_combine_backward, (ceil_div(n, bm),), arguments)
