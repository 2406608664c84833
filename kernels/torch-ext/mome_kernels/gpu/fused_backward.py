"""Backward pass of the fused feed-forward experts: hidden activations are computed again, never read from memory.

There are two kernels. One computes the gradients of tokens and routing weights, row tile by row tile. The other
computes the gradients of the experts' weights: each program sums a part of an expert's rows in float32, and the
partial sums are then added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..weights import ExpertWeights
from .activation import activate, activate_slope
from .fused import config_of, constants, load_down, load_rows, load_up, product
from .launch import Launch, Machine, ceil_div
from .routing import Tiles


@triton.jit
def _hidden(
    x0, x1, g0, g1, up, up_bias, down, e, f, D: tl.constexpr, F: tl.constexpr, D0: tl.constexpr, P1: tl.constexpr,
    D1: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For hidden units f: h, dh = g W₂, and the gradients of both halves of z, without the routing weight."""
    WIDTH: tl.constexpr = 2 * F if GATED else F
    unit = e * WIDTH
    w0 = load_up(up, unit, f, D, F, 0, D0)
    w1 = load_up(up, unit, f, D, F, D0, P1)
    z = product(x0, x1, w0, w1, D1, PRECISION)
    if up_bias is not None:
        z += tl.load(up_bias + unit + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    u0 = load_down(down, e, f, D, F, 0, D0)
    u1 = load_down(down, e, f, D, F, D0, P1)
    dh = product(g0, g1, tl.trans(u0), tl.trans(u1), D1, PRECISION)
    h = activate(z, ACT)
    d_first = dh * activate_slope(z, ACT)
    d_second = dh
    if GATED:
        v0 = load_up(up, unit + F, f, D, F, 0, D0)
        v1 = load_up(up, unit + F, f, D, F, D0, P1)
        u = product(x0, x1, v0, v1, D1, PRECISION)
        if up_bias is not None:
            u += tl.load(up_bias + unit + F + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
        d_first = d_first * u
        d_second = dh * h
        h = h * u
    return h, dh, d_first, d_second


@triton.jit
def _mlp_dx(
    grad, x, up, up_bias, down, down_bias, weights_TK, slots, dx, d_weights_TK, tile_expert, tile_row, offsets, ROWS,
    PER_TOKEN: tl.constexpr, D: tl.constexpr, F: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr,
    BF: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, SCATTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores dx in expert order, or at its token with SCATTER, and d_weights_TK at its slot."""
    tile = tl.program_id(0)
    e = tl.load(tile_expert + tile).to(tl.int64)
    if e < 0:
        return
    first = tl.load(tile_row + tile)
    last = first + tl.minimum(ROWS, tl.load(offsets + e + 1) - first)
    WIDTH: tl.constexpr = 2 * F if GATED else F
    P1: tl.constexpr = D1 if D1 > 0 else 16
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, P1)
    for start in range(first, last, BM):
        row = start + tl.arange(0, BM)
        live = row < last
        slot = tl.load(slots + row, mask=live, other=0).to(tl.int64)
        token = slot // PER_TOKEN
        x0 = load_rows(x, token, live, D, 0, D0)
        x1 = load_rows(x, token, live, D, D0, P1)
        g0 = load_rows(grad, token, live, D, 0, D0)
        g1 = load_rows(grad, token, live, D, D0, P1)
        acc0 = tl.zeros([BM, D0], tl.float32)
        acc1 = tl.zeros([BM, P1], tl.float32)
        d_weight = tl.zeros([BM], tl.float32)
        for base in range(0, F, BF):
            f = base + tl.arange(0, BF)
            h, dh, d_first, d_second = _hidden(
                x0, x1, g0, g1, up, up_bias, down, e, f, D, F, D0, P1, D1, ACT, GATED, PRECISION
            )
            d_weight += tl.sum(dh * h, axis=1)
            d_first = d_first.to(x0.dtype)
            w0 = load_up(up, e * WIDTH, f, D, F, 0, D0)
            acc0 = tl.dot(d_first, tl.trans(w0), acc0, input_precision=PRECISION)
            if D1 > 0:
                w1 = load_up(up, e * WIDTH, f, D, F, D0, P1)
                acc1 = tl.dot(d_first, tl.trans(w1), acc1, input_precision=PRECISION)
            if GATED:
                d_second = d_second.to(x0.dtype)
                v0 = load_up(up, e * WIDTH + F, f, D, F, 0, D0)
                acc0 += tl.dot(d_second, tl.trans(v0), input_precision=PRECISION)
                if D1 > 0:
                    v1 = load_up(up, e * WIDTH + F, f, D, F, D0, P1)
                    acc1 += tl.dot(d_second, tl.trans(v1), input_precision=PRECISION)
        if down_bias is not None:
            b0 = tl.load(down_bias + e * D + d0, mask=d0 < D, other=0.0).to(tl.float32)
            d_weight += tl.sum(g0.to(tl.float32) * b0[None, :], axis=1)
            if D1 > 0:
                b1 = tl.load(down_bias + e * D + d1, mask=d1 < D, other=0.0).to(tl.float32)
                d_weight += tl.sum(g1.to(tl.float32) * b1[None, :], axis=1)
        tl.store(d_weights_TK + slot, d_weight, mask=live)
        weight = tl.load(weights_TK + slot, mask=live, other=0.0).to(tl.float32)[:, None]
        target = token if SCATTER else row.to(tl.int64)
        tl.store(dx + target[:, None] * D + d0[None, :], acc0 * weight, mask=live[:, None] & (d0 < D)[None, :])
        if D1 > 0:
            tl.store(dx + target[:, None] * D + d1[None, :], acc1 * weight, mask=live[:, None] & (d1 < D)[None, :])


@triton.jit
def _store_up(ptr, value, f, D: tl.constexpr, F: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    d = FROM + tl.arange(0, WIDTH)
    tl.store(ptr + f[:, None] * D + d[None, :], value, mask=(f < F)[:, None] & (d < D)[None, :])


@triton.jit
def _store_down(ptr, value, f, D: tl.constexpr, F: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    d = FROM + tl.arange(0, WIDTH)
    tl.store(ptr + d[None, :] * F + f[:, None], value, mask=(f < F)[:, None] & (d < D)[None, :])


@triton.jit
def _mlp_dw(
    grad, x, up, up_bias, down, weights_TK, slots, parts, tile_expert, tile_row, offsets, ROWS, BLOCKS_F, STRIDE,
    PER_TOKEN: tl.constexpr, D: tl.constexpr, F: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr,
    BF: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums over one tile of dW₁ (F or 2F, D), dW₂ (D, F) and db₁, one after the other, for one block of F."""
    pid = tl.program_id(0)
    tile = (pid // BLOCKS_F).to(tl.int64)
    block = pid % BLOCKS_F
    e = tl.load(tile_expert + tile).to(tl.int64)
    if e < 0:
        return
    first = tl.load(tile_row + tile)
    last = first + tl.minimum(ROWS, tl.load(offsets + e + 1) - first)
    WIDTH: tl.constexpr = 2 * F if GATED else F
    P1: tl.constexpr = D1 if D1 > 0 else 16
    f = block * BF + tl.arange(0, BF)
    # 0, which the compiler does not know: an accumulator that begins with the constant shares the register of all other
    # zeros, and then ptxas 12.8 copies accumulators for sm_90 while products that write them are running
    zero = tl.minimum(first, 0).to(tl.float32)
    up0 = tl.full([BF, D0], zero, tl.float32)
    up1 = tl.full([BF, P1], zero, tl.float32)
    down0 = tl.full([BF, D0], zero, tl.float32)
    down1 = tl.full([BF, P1], zero, tl.float32)
    if GATED:
        second0 = tl.full([BF, D0], zero, tl.float32)
        second1 = tl.full([BF, P1], zero, tl.float32)
        b_second = tl.zeros([BF], tl.float32)
    b_up = tl.zeros([BF], tl.float32)
    for start in range(first, last, BM):
        row = start + tl.arange(0, BM)
        live = row < last
        slot = tl.load(slots + row, mask=live, other=0).to(tl.int64)
        token = slot // PER_TOKEN
        x0 = load_rows(x, token, live, D, 0, D0)
        x1 = load_rows(x, token, live, D, D0, P1)
        weight = tl.load(weights_TK + slot, mask=live, other=0.0).to(tl.float32)[:, None]
        # scaling the output's gradient here scales everything computed from it below
        g0 = (load_rows(grad, token, live, D, 0, D0).to(tl.float32) * weight).to(x0.dtype)
        g1 = (load_rows(grad, token, live, D, D0, P1).to(tl.float32) * weight).to(x0.dtype)
        h, dh, d_first, d_second = _hidden(
            x0, x1, g0, g1, up, up_bias, down, e, f, D, F, D0, P1, D1, ACT, GATED, PRECISION
        )
        if up_bias is not None:
            b_up += tl.sum(d_first, axis=0)
        h = tl.trans(h.to(x0.dtype))
        d_first = tl.trans(d_first.to(x0.dtype))
        up0 = tl.dot(d_first, x0, up0, input_precision=PRECISION)
        down0 = tl.dot(h, g0, down0, input_precision=PRECISION)
        if D1 > 0:
            up1 = tl.dot(d_first, x1, up1, input_precision=PRECISION)
            down1 = tl.dot(h, g1, down1, input_precision=PRECISION)
        if GATED:
            if up_bias is not None:
                b_second += tl.sum(d_second, axis=0)
            d_second = tl.trans(d_second.to(x0.dtype))
            second0 = tl.dot(d_second, x0, second0, input_precision=PRECISION)
            if D1 > 0:
                second1 = tl.dot(d_second, x1, second1, input_precision=PRECISION)
    at = parts + tile * STRIDE
    _store_up(at, up0, f, D, F, 0, D0)
    if D1 > 0:
        _store_up(at, up1, f, D, F, D0, P1)
    if GATED:
        _store_up(at + F * D, second0, f, D, F, 0, D0)
        if D1 > 0:
            _store_up(at + F * D, second1, f, D, F, D0, P1)
    at += WIDTH * D
    _store_down(at, down0, f, D, F, 0, D0)
    if D1 > 0:
        _store_down(at, down1, f, D, F, D0, P1)
    if up_bias is not None:
        at += D * F
        tl.store(at + f, b_up, mask=f < F)
        if GATED:
            tl.store(at + F + f, b_second, mask=f < F)


def plan_dx(
    grad: Tensor, x: Tensor, experts: ExpertWeights, weights_TK: Tensor, slots: Tensor, offsets: Tensor, tiles: Tiles,
    dx: Tensor, d_weights_TK: Tensor, machine: Machine, *, scatter: bool,
) -> Launch:  # fmt: skip
    """A launch of the kernel for the gradients of tokens and routing weights."""
    config = config_of("mlp_dx", x, experts, machine)
    arguments = {
        "grad": grad, "x": x, "up": experts.up, "up_bias": experts.up_bias, "down": experts.down,
        "down_bias": experts.down_bias, "weights_TK": weights_TK, "slots": slots, "dx": dx,
        "d_weights_TK": d_weights_TK, "tile_expert": tiles.expert, "tile_row": tiles.row, "offsets": offsets,
        "ROWS": tiles.rows, "SCATTER": scatter, **constants(x, weights_TK, experts, config, machine),
    }  # fmt: skip
    return Launch(_mlp_dx, (tiles.bound,), arguments, config["num_warps"], config["num_stages"])


def plan_dw(
    grad: Tensor, x: Tensor, experts: ExpertWeights, weights_TK: Tensor, slots: Tensor, offsets: Tensor, tiles: Tiles,
    parts: Tensor, machine: Machine,
) -> Launch:  # fmt: skip
    """A launch of the kernel for the weights' gradients.

    It stores into `parts` (bound, at least the length of dW₁, dW₂ and db₁ of one expert) float32.
    """
    config = config_of("mlp_dw", x, experts, machine)
    blocks = ceil_div(experts.hidden_width, config["BF"])
    arguments = {
        "grad": grad, "x": x, "up": experts.up, "up_bias": experts.up_bias, "down": experts.down,
        "weights_TK": weights_TK, "slots": slots, "parts": parts, "tile_expert": tiles.expert, "tile_row": tiles.row,
        "offsets": offsets, "ROWS": tiles.rows, "BLOCKS_F": blocks, "STRIDE": parts.shape[1],
        **constants(x, weights_TK, experts, config, machine),
    }  # fmt: skip
    return Launch(_mlp_dw, (tiles.bound * blocks,), arguments, config["num_warps"], config["num_stages"])
