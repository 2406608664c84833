"""Kernels of the fusion head for 16 and 32 channels, too wide for `head_voxels`: a program computes a tile of voxels.

The products of the layers run on tensor cores. Sums over channels and scales cross threads, which takes most of the
time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _fuse(f, query, bias, live, S: tl.constexpr, TOP_K: tl.constexpr):
    """Softmax of the scores over the scales: f (S, V, C), query (C,), bias (S,), live (S,) to weights (S, V)."""
    score = tl.sum(f * query[None, None, :], axis=2) + bias[:, None]
    score = tl.where(live[:, None], score, float("-inf"))
    if TOP_K > 0:
        index = tl.arange(0, S)
        above = (score[None, :, :] > score[:, None, :]) | (
            (score[None, :, :] == score[:, None, :]) & (index[None, :] < index[:, None])[:, :, None]
        )
        score = tl.where(tl.sum(above.to(tl.int32), axis=1) < TOP_K, score, float("-inf"))
    score = tl.exp(score - tl.max(score, axis=0)[None, :])
    return score / tl.sum(score, axis=0)[None, :]


@triton.jit
def _times(a, b, PRECISION: tl.constexpr):
    """a (M, K) · b (K, N), on tensor cores; on vector units where PRECISION is None."""
    if PRECISION is None:
        # summed over the last axis, since the compiler would turn a sum over the middle one into a tf32 product
        return tl.sum(a[:, None, :] * tl.trans(b)[None, :, :], axis=2)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _layer(x, w, b, slope, PRECISION: tl.constexpr):
    """Leaky ReLU of w x + b, (V, C), for x (V, C), w (C out, C in) and b (C out,)."""
    y = _times(x, tl.trans(w), PRECISION) + b[None, :]
    return tl.where(y > 0, y, y * slope)


@triton.jit
def forward(
    f_ptr, q_ptr, s_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr, out_ptr,
    V, P, SCALES, slope,
    S: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    voxel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = voxel < V
    scale, channel = tl.arange(0, S), tl.arange(0, C)
    live = scale < SCALES
    where = ((batch * SCALES + scale[:, None, None]) * C + channel[None, None, :]) * V + voxel[None, :, None]
    f = tl.load(f_ptr + where, mask=live[:, None, None] & inside[None, :, None], other=0.0)
    square = channel[:, None] * C + channel[None, :]
    for p in range(P):
        query = tl.load(q_ptr + p * C + channel)
        bias = tl.load(s_ptr + p * SCALES + scale, mask=live, other=0.0)
        weight = _fuse(f, query, bias, live, S, TOP_K)
        mixture = tl.sum(weight[:, :, None] * f, axis=0)
        row = batch * P + p
        hidden = _layer(
            mixture, tl.load(w1_ptr + row * C * C + square), tl.load(b1_ptr + row * C + channel), slope, PRECISION
        )
        hidden = _layer(
            hidden, tl.load(w2_ptr + row * C * C + square), tl.load(b2_ptr + row * C + channel), slope, PRECISION
        )
        w3 = tl.load(w3_ptr + row * C + channel)
        logit = tl.sum(hidden * w3[None, :], axis=1) + tl.load(b3_ptr + row)
        tl.store(out_ptr + row * V + voxel, logit, mask=inside)


@triton.jit
def _add(at, value, first, mask):
    """Adds value to the memory at `at`, which the first tile overwrites instead."""
    before = tl.load(at, mask=mask & (first == 0), other=0.0)
    tl.store(at, before + value, mask=mask)


@triton.jit
def backward(
    g_ptr, f_ptr, q_ptr, s_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, df_ptr, part_ptr,
    V, P, SCALES, TILES, PROGRAMS, WIDTH, slope,
    S: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of a (batch, prompt, program): d query C, d bias S, d W1 C², d b1 C, d W2 C², d b2 C, d w3 C, d b3.

    A program takes every PROGRAMS-th tile and adds to its own row, so that the buffer does not grow with V.
    """
    batch = tl.program_id(1).to(tl.int64)
    program = tl.program_id(0)
    scale, channel = tl.arange(0, S), tl.arange(0, C)
    live = scale < SCALES
    every = channel < C
    square = channel[:, None] * C + channel[None, :]
    for tile in range(program, TILES, PROGRAMS):
        voxel = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = voxel < V
        first_tile = tl.cast(tile == program, tl.int32)
        where = ((batch * SCALES + scale[:, None, None]) * C + channel[None, None, :]) * V + voxel[None, :, None]
        keep = live[:, None, None] & inside[None, :, None]
        f = tl.load(f_ptr + where, mask=keep, other=0.0)
        d_f = tl.zeros([S, BLOCK, C], dtype=tl.float32)
        for p in range(P):
            query = tl.load(q_ptr + p * C + channel)
            bias = tl.load(s_ptr + p * SCALES + scale, mask=live, other=0.0)
            weight = _fuse(f, query, bias, live, S, TOP_K)
            mixture = tl.sum(weight[:, :, None] * f, axis=0)
            row = batch * P + p
            w1, w2 = tl.load(w1_ptr + row * C * C + square), tl.load(w2_ptr + row * C * C + square)
            first = _layer(mixture, w1, tl.load(b1_ptr + row * C + channel), slope, PRECISION)
            second = _layer(first, w2, tl.load(b2_ptr + row * C + channel), slope, PRECISION)
            w3 = tl.load(w3_ptr + row * C + channel)
            g = tl.load(g_ptr + row * V + voxel, mask=inside, other=0.0)
            d_second = w3[None, :] * g[:, None]
            d_second = tl.where(second > 0, d_second, d_second * slope)
            d_first = _times(d_second, w2, PRECISION)
            d_first = tl.where(first > 0, d_first, d_first * slope)
            d_mixture = _times(d_first, w1, PRECISION)
            d_weight = tl.sum(d_mixture[None, :, :] * f, axis=2)  # (S, V)
            d_score = weight * (d_weight - tl.sum(weight * d_weight, axis=0)[None, :])
            d_f += weight[:, :, None] * d_mixture[None, :, :] + d_score[:, :, None] * query[None, None, :]
            at = part_ptr + (row * PROGRAMS + program) * WIDTH
            _add(at + channel, tl.sum(tl.sum(d_score[:, :, None] * f, axis=1), axis=0), first_tile, every)
            at += C
            _add(at + scale, tl.sum(d_score, axis=1), first_tile, live)
            at += SCALES
            all_square = square >= 0
            _add(at + square, _times(tl.trans(d_first), mixture, PRECISION), first_tile, all_square)
            at += C * C
            _add(at + channel, tl.sum(d_first, axis=0), first_tile, every)
            at += C
            _add(at + square, _times(tl.trans(d_second), first, PRECISION), first_tile, all_square)
            at += C * C
            _add(at + channel, tl.sum(d_second, axis=0), first_tile, every)
            at += C
            _add(at + channel, tl.sum(second * g[:, None], axis=0), first_tile, every)
            one = tl.arange(0, 1)
            _add(at + C + one, tl.sum(g[None, :], axis=1), first_tile, one == 0)
        tl.store(df_ptr + where, d_f, mask=keep)
        tl.debug_barrier()  # in the next tile another thread may read these sums
