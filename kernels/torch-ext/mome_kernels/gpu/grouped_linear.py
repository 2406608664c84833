"""Grouped linear layers: rows sorted by expert, each expert's rows times its own matrix.

Forward and dX are one kernel with the strides of the matrix swapped, so that no transposed copy is made. Rows may be
gathered when they are read and scattered when they are stored; bias, activation and routing weight are applied before
the store. Row offsets are 64-bit, since 10⁶ tokens times a few thousand columns exceed 2³¹ elements. Where the
configuration says `tma`, the matrix, and rows that are not gathered, are read through tensor descriptors if the
hardware can describe them.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import configs, routing
from .activation import activate
from .descriptors import describe
from .launch import Launch, Machine, ceil_div, empty
from .routing import Tiles


@triton.jit
def _weight_block(w, e, column, start, BN: tl.constexpr, BK: tl.constexpr, TRANSPOSE: tl.constexpr):
    """W_eᵀ (BK, BN) through TMA, with zeros past the ends of the expert's matrix."""
    at = e.to(tl.int32)
    if TRANSPOSE:
        block = w.load([at, start, column]).reshape([BK, BN])
    else:
        block = tl.trans(w.load([at, column, start]).reshape([BN, BK]))
    return block


@triton.jit(do_not_specialize=["STEP"])
def _grouped_linear(
    a, w, bias, weights_TK, slots, out, z_out, tile_expert, tile_row, tile_start, offsets,
    E, N, K, STRIDE_A, STRIDE_WE, STRIDE_WN, STRIDE_WK, TILES_N, STEP,
    PER_TOKEN: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr, A_TMA: tl.constexpr, W_TMA: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    """out[i] = weight · a(W_e A[row i] + b_e). A persistent program takes every STEP-th tile.

    `GROUP_M` row tiles use the same columns of one expert before the next columns begin, so that these stay in L2.
    With A_TMA or W_TMA, `a` or `w` is a descriptor. A descriptor masks only the ends of the tensor: a block may hold
    rows of the next expert, or columns of a gated layer's other half, which are not stored.
    """
    total = tl.load(tile_start + E) * TILES_N
    for t in range(tl.program_id(0), total, STEP):
        group = t // (GROUP_M * TILES_N)
        height = tl.minimum(total // TILES_N - group * GROUP_M, GROUP_M)
        within = t - group * GROUP_M * TILES_N
        tile = group * GROUP_M + within % height
        column = (within // height) * BN
        e = tl.load(tile_expert + tile).to(tl.int64)
        first = tl.load(tile_row + tile)
        row = first + tl.arange(0, BM)
        live = row < tl.load(offsets + e + 1)
        row64 = row.to(tl.int64)
        if GATHER or SCATTER or (weights_TK is not None):
            slot = tl.load(slots + row, mask=live, other=0).to(tl.int64)
        source = slot // PER_TOKEN if GATHER else row64
        n = column + tl.arange(0, BN)
        k = tl.arange(0, BK)
        if not A_TMA:
            a_at = a + source[:, None] * STRIDE_A + k[None, :]
        if not W_TMA:
            w_at = w + e * STRIDE_WE + n.to(tl.int64)[None, :] * STRIDE_WN + k[:, None] * STRIDE_WK
        acc = tl.zeros([BM, BN], tl.float32)
        if GATED:
            second = tl.zeros([BM, BN], tl.float32)
            if not W_TMA:
                u_at = w_at + (e * 0 + N) * STRIDE_WN
        for start in range(0, K, BK):
            if not EVEN_K:
                inside = start + k < K
            if A_TMA:
                rows = a.load([first, start])
            elif EVEN_K:
                rows = tl.load(a_at, mask=live[:, None], other=0.0)
            else:
                rows = tl.load(a_at, mask=live[:, None] & inside[None, :], other=0.0)
            if W_TMA:
                cols = _weight_block(w, e, column, start, BN, BK, TRANSPOSE)
            elif EVEN_K:
                cols = tl.load(w_at, mask=(n < N)[None, :], other=0.0)
            else:
                cols = tl.load(w_at, mask=(n < N)[None, :] & inside[:, None], other=0.0)
            acc = tl.dot(rows, cols, acc, input_precision=PRECISION)
            if GATED:
                if W_TMA:
                    more = _weight_block(w, e, column + N, start, BN, BK, TRANSPOSE)
                elif EVEN_K:
                    more = tl.load(u_at, mask=(n < N)[None, :], other=0.0)
                else:
                    more = tl.load(u_at, mask=(n < N)[None, :] & inside[:, None], other=0.0)
                second = tl.dot(rows, more, second, input_precision=PRECISION)
                if not W_TMA:
                    u_at += BK * STRIDE_WK
            if not A_TMA:
                a_at += BK
            if not W_TMA:
                w_at += BK * STRIDE_WK
        keep = live[:, None] & (n < N)[None, :]
        if bias is not None:
            width = 2 * N if GATED else N
            acc += tl.load(bias + e * width + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            if GATED:
                second += tl.load(bias + e * width + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if z_out is not None:
            z_at = z_out + row64[:, None] * (2 * N if GATED else N) + n[None, :]
            tl.store(z_at, acc, mask=keep)
            if GATED:
                tl.store(z_at + N, second, mask=keep)
        y = activate(acc, ACT)
        if GATED:
            y = y * second
        if weights_TK is not None:
            y = y * tl.load(weights_TK + slot, mask=live, other=0.0).to(tl.float32)[:, None]
        target = slot if SCATTER else row64
        tl.store(out + target[:, None] * N + n[None, :], y, mask=keep)


def plan_linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: Tiles,
    offsets: Tensor,
    out: Tensor,
    machine: Machine,
    *,
    slots: Tensor | None = None,
    per_token: int = 1,
    weights_TK: Tensor | None = None,
    transpose: bool = False,
    activation: str = "none",
    gated: bool = False,
    gather: bool = False,
    scatter: bool = False,
    z_out: Tensor | None = None,
) -> Launch:
    """A launch of the grouped linear kernel.

    Args:
        a: (rows, K), or with `gather` (tokens, K), read at slots // per_token.
        weight: (E, N, K), with `gated` (E, 2N, K); with `transpose` (E, K, N), for dX.
        tiles: Tiles of exactly BM rows, as `rows_per_tile` gives them.
        slots: The permutation of `route`, or the gather index of `grouped_linear` with `per_token` 1.
        out: (rows, N); with `scatter` rows are written at their slots.
        z_out: Receives the values before the activation, (rows, N) or (rows, 2N), or None.
    """
    columns = weight.shape[2] if transpose else weight.shape[1]
    inner = weight.shape[1] if transpose else weight.shape[2]
    n = columns // 2 if gated else columns
    epilogue = activation != "none" or gated or z_out is not None
    config = configs.linear(machine, n, inner, a.element_size(), gated, epilogue)
    stride_n, stride_k = (1, weight.shape[2]) if transpose else (weight.shape[2], 1)
    tiles_n = ceil_div(n, config["BN"])
    a_in, w_in = a, weight
    if config.get("tma"):
        box = (config["BK"], config["BN"]) if transpose else (config["BN"], config["BK"])
        w_in = describe(weight, (1, *box), machine)
        a_in = a if gather else describe(a, (config["BM"], config["BK"]), machine)
    step = min(tiles.bound * tiles_n, machine.processors * config["per_processor"])
    arguments = {
        "a": a_in, "w": w_in, "bias": bias, "weights_TK": weights_TK, "slots": slots, "out": out, "z_out": z_out,
        "tile_expert": tiles.expert, "tile_row": tiles.row, "tile_start": tiles.start, "offsets": offsets,
        "E": weight.shape[0], "N": n, "K": inner, "STRIDE_A": a.shape[1],
        "STRIDE_WE": weight.shape[1] * weight.shape[2], "STRIDE_WN": stride_n, "STRIDE_WK": stride_k,
        "TILES_N": tiles_n, "STEP": step, "PER_TOKEN": per_token, "ACT": activation, "GATED": gated, "GATHER": gather,
        "SCATTER": scatter, "BM": config["BM"], "BN": config["BN"], "BK": config["BK"],
        "EVEN_K": inner % config["BK"] == 0, "GROUP_M": config["GROUP_M"], "PRECISION": configs.precision(a, machine),
        "A_TMA": a_in is not a, "W_TMA": w_in is not weight, "TRANSPOSE": transpose,
    }  # fmt: skip
    return Launch(_grouped_linear, (step,), arguments, config["num_warps"], config["num_stages"])


def rows_per_tile(
    machine: Machine, weight: Tensor, element_size: int, transpose: bool, gated: bool, epilogue: bool
) -> int:
    """BM of the configuration that `plan_linear` takes."""
    columns, inner = (weight.shape[2], weight.shape[1]) if transpose else weight.shape[1:]
    return configs.linear(machine, columns // 2 if gated else columns, inner, element_size, gated, epilogue)["BM"]


def run_linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    assignments: int,
    machine: Machine,
    *,
    transpose: bool = False,
    gated: bool = False,
    activation: str = "none",
    z_out: Tensor | None = None,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Plans tiles, runs the kernel and returns its output (assignments, N) in expert order; see `plan_linear`."""
    epilogue = activation != "none" or gated or z_out is not None
    height = rows_per_tile(machine, weight, a.element_size(), transpose, gated, epilogue)
    tiles = routing.tiles(offsets, assignments, height)
    columns = weight.shape[2] if transpose else weight.shape[1] // (2 if gated else 1)
    out = empty(a, assignments, columns) if out is None else out
    plan_linear(
        a, weight, bias, tiles, offsets, out, machine, transpose=transpose, gated=gated, activation=activation,
        z_out=z_out, **options,
    ).run()  # fmt: skip
    return out
