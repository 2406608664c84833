"""Grouped linear layers: rows sorted by expert, each expert's rows times its own matrix.

Forward and dX are one kernel with the weight's strides swapped, so that no transposed copy is ever made. Rows may be
gathered on the way in and scattered on the way out; bias, activation and gate are applied before the store. Row
offsets are 64-bit: 10⁶ tokens times a few thousand columns pass 2³¹ elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .activation import activate
from .launch import Launch, Machine, ceil_div
from .routing import Tiles


@triton.jit(do_not_specialize=["STEP"])
def _grouped_linear(
    a, w, bias, gates, slots, out, z_out, tile_expert, tile_row, tile_start, offsets,
    E, N, K, STRIDE_A, STRIDE_WE, STRIDE_WN, STRIDE_WK, TILES_N, STEP,
    SHARE: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[i] = gate · a(W_e A[row i] + b_e). A persistent program walks the tiles STEP apart.

    `GROUP_M` row tiles share the columns of one expert before the next columns are begun: what they read stays in L2.
    """
    total = tl.load(tile_start + E) * TILES_N
    for t in range(tl.program_id(0), total, STEP):
        group = t // (GROUP_M * TILES_N)
        height = tl.minimum(total // TILES_N - group * GROUP_M, GROUP_M)
        within = t - group * GROUP_M * TILES_N
        tile = group * GROUP_M + within % height
        column = (within // height) * BN
        e = tl.load(tile_expert + tile).to(tl.int64)
        row = tl.load(tile_row + tile) + tl.arange(0, BM)
        live = row < tl.load(offsets + e + 1)
        row64 = row.to(tl.int64)
        if GATHER or SCATTER or (gates is not None):
            slot = tl.load(slots + row, mask=live, other=0).to(tl.int64)
        source = slot // SHARE if GATHER else row64
        n = column + tl.arange(0, BN)
        k = tl.arange(0, BK)
        a_at = a + source[:, None] * STRIDE_A + k[None, :]
        w_at = w + e * STRIDE_WE + n.to(tl.int64)[None, :] * STRIDE_WN + k[:, None] * STRIDE_WK
        acc = tl.zeros([BM, BN], tl.float32)
        if GATED:
            second = tl.zeros([BM, BN], tl.float32)
            u_at = w_at + (e * 0 + N) * STRIDE_WN
        for start in range(0, K, BK):
            if EVEN_K:
                rows = tl.load(a_at, mask=live[:, None], other=0.0)
                cols = tl.load(w_at, mask=(n < N)[None, :], other=0.0)
            else:
                inside = start + k < K
                rows = tl.load(a_at, mask=live[:, None] & inside[None, :], other=0.0)
                cols = tl.load(w_at, mask=(n < N)[None, :] & inside[:, None], other=0.0)
            acc = tl.dot(rows, cols, acc, input_precision=PRECISION)
            if GATED:
                if EVEN_K:
                    more = tl.load(u_at, mask=(n < N)[None, :], other=0.0)
                else:
                    more = tl.load(u_at, mask=(n < N)[None, :] & inside[:, None], other=0.0)
                second = tl.dot(rows, more, second, input_precision=PRECISION)
                u_at += BK * STRIDE_WK
            a_at += BK
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
        if gates is not None:
            y = y * tl.load(gates + slot, mask=live, other=0.0).to(tl.float32)[:, None]
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
    share: int = 1,
    gates: Tensor | None = None,
    transpose: bool = False,
    activation: str = "none",
    gated: bool = False,
    gather: bool = False,
    scatter: bool = False,
    z_out: Tensor | None = None,
) -> Launch:
    """A launch of the grouped linear kernel.

    Args:
        a: (rows, K), or with `gather` (tokens, K), read at slots // share.
        weight: (E, N, K), with `gated` (E, 2N, K); with `transpose` (E, K, N), for dX.
        tiles: Tiles of exactly the configuration's BM rows: see `rows_per_tile`.
        out: (rows, N), or with `scatter` written at the slots.
        z_out: Where given, what precedes the activation is stored there, (rows, N) or (rows, 2N).
    """
    columns = weight.shape[2] if transpose else weight.shape[1]
    inner = weight.shape[1] if transpose else weight.shape[2]
    n = columns // 2 if gated else columns
    epilogue = activation != "none" or gated or z_out is not None
    config = configs.linear(machine, n, inner, a.element_size(), gated, epilogue)
    stride_n, stride_k = (1, weight.shape[2]) if transpose else (weight.shape[2], 1)
    tiles_n = ceil_div(n, config["BN"])
    step = min(tiles.bound * tiles_n, machine.processors * config["per_processor"])
    arguments = {
        "a": a, "w": weight, "bias": bias, "gates": gates, "slots": slots, "out": out, "z_out": z_out,
        "tile_expert": tiles.expert, "tile_row": tiles.row, "tile_start": tiles.start, "offsets": offsets,
        "E": weight.shape[0], "N": n, "K": inner, "STRIDE_A": a.shape[1],
        "STRIDE_WE": weight.shape[1] * weight.shape[2], "STRIDE_WN": stride_n, "STRIDE_WK": stride_k,
        "TILES_N": tiles_n, "STEP": step, "SHARE": share, "ACT": activation, "GATED": gated, "GATHER": gather,
        "SCATTER": scatter, "BM": config["BM"], "BN": config["BN"], "BK": config["BK"],
        "EVEN_K": inner % config["BK"] == 0, "GROUP_M": config["GROUP_M"], "PRECISION": configs.precision(a, machine),
    }  # fmt: skip
    return Launch(_grouped_linear, (step,), arguments, config["num_warps"], config["num_stages"])


def rows_per_tile(
    machine: Machine, weight: Tensor, element_size: int, transpose: bool, gated: bool, epilogue: bool
) -> int:
    """BM of the configuration that `plan_linear` will take."""
    columns, inner = (weight.shape[2], weight.shape[1]) if transpose else weight.shape[1:]
    return configs.linear(machine, columns // 2 if gated else columns, inner, element_size, gated, epilogue)["BM"]


@triton.jit
def _grouped_dw(
    dy, x, gates, slots, tile_expert, tile_row, offsets, dw, db, N, K, ROWS, TILES_N, TILES_K,
    SHARE: tl.constexpr, SPLIT: tl.constexpr, GATHER_Y: tl.constexpr, GATHER_X: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW = Σ gate · dy xᵀ over an expert's rows, or with SPLIT over one tile of them into a float32 partial.

    Every program stores what it has, zeros for an expert without rows.
    """
    pid = tl.program_id(0).to(tl.int64)
    part = pid // (TILES_N * TILES_K)
    tn = (pid // TILES_K) % TILES_N
    tk = pid % TILES_K
    if SPLIT:
        e = tl.load(tile_expert + part).to(tl.int64)
        if e < 0:
            return
        low = tl.load(tile_row + part)
        high = tl.minimum(low + ROWS, tl.load(offsets + e + 1))
    else:
        low = tl.load(offsets + part)
        high = tl.load(offsets + part + 1)
    n = tn * BN + tl.arange(0, BN)
    k = tk * BK + tl.arange(0, BK)
    acc = tl.zeros([BN, BK], tl.float32)
    total = tl.zeros([BN], tl.float32)
    for start in range(low, high, BT):
        row = start + tl.arange(0, BT)
        live = row < high
        row64 = row.to(tl.int64)
        if GATHER_Y or GATHER_X or (gates is not None):
            slot = tl.load(slots + row, mask=live, other=0).to(tl.int64)
        from_y = slot // SHARE if GATHER_Y else row64
        from_x = slot // SHARE if GATHER_X else row64
        y = tl.load(dy + from_y[:, None] * N + n[None, :], mask=live[:, None] & (n < N)[None, :], other=0.0)
        rows = tl.load(x + from_x[:, None] * K + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
        if gates is not None:
            gate = tl.load(gates + slot, mask=live, other=0.0).to(tl.float32)
            scaled = y.to(tl.float32) * gate[:, None]
            if db is not None:
                total += tl.sum(scaled, axis=0)
            y = scaled.to(rows.dtype)
        else:
            if db is not None:
                total += tl.sum(y.to(tl.float32), axis=0)
        acc = tl.dot(tl.trans(y), rows, acc, input_precision=PRECISION)
    at = dw + part * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(at, acc, mask=(n < N)[:, None] & (k < K)[None, :])
    if db is not None:
        if tk == 0:
            tl.store(db + part * N + n, total, mask=n < N)


@triton.jit(do_not_specialize=["TILES"])
def _sum_parts(parts, tile_start, out, WIDTH, STRIDE, BLOCKS, TILES, BLOCK: tl.constexpr):
    """out[e] = the sum of expert e's partials in their order; zeros where it has none."""
    e = (tl.program_id(0) // BLOCKS).to(tl.int64)
    i = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    first = tl.load(tile_start + e)
    at = parts + first.to(tl.int64) * STRIDE + i
    for _ in range(first, tl.load(tile_start + e + 1)):
        acc += tl.load(at, mask=i < WIDTH, other=0.0)
        at += STRIDE
    tl.store(out + e * WIDTH + i, acc, mask=i < WIDTH)


def plan_dw(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    dw: Tensor,
    db: Tensor | None,
    machine: Machine,
    *,
    tiles: Tiles | None = None,
    slots: Tensor | None = None,
    share: int = 1,
    gates: Tensor | None = None,
    gather_y: bool = False,
    gather_x: bool = False,
) -> Launch:
    """A launch of the dW kernel: into (E, N, K) directly, or with `tiles` into (bound, N, K) float32 partials."""
    n, k = dy.shape[1], x.shape[1]
    config = configs.dw(machine, n, k, x.element_size())
    tiles_n, tiles_k = ceil_div(n, config["BN"]), ceil_div(k, config["BK"])
    parts = offsets.numel() - 1 if tiles is None else tiles.bound
    arguments = {
        "dy": dy, "x": x, "gates": gates, "slots": slots, "tile_expert": None if tiles is None else tiles.expert,
        "tile_row": None if tiles is None else tiles.row, "offsets": offsets, "dw": dw, "db": db, "N": n, "K": k,
        "ROWS": 0 if tiles is None else tiles.rows, "TILES_N": tiles_n, "TILES_K": tiles_k, "SHARE": share,
        "SPLIT": tiles is not None, "GATHER_Y": gather_y, "GATHER_X": gather_x, "BT": config["BT"],
        "BN": config["BN"], "BK": config["BK"], "PRECISION": configs.precision(x, machine),
    }  # fmt: skip
    return Launch(_grouped_dw, (parts * tiles_n * tiles_k,), arguments, config["num_warps"], config["num_stages"])


def rows_per_share(machine: Machine, assignments: int, programs: int, least: int = 256) -> int:
    """Rows of one share of dW such that about four programs meet every multiprocessor; 0: do not split.

    From shapes and the device alone, never from timing, so that a rerun adds in the same order.
    """
    wanted = 4 * machine.processors
    if programs >= wanted or assignments <= least:
        return 0
    return max(least, ceil_div(ceil_div(assignments * programs, wanted), 64) * 64)


def plan_sum(parts: Tensor, tiles: Tiles, out: Tensor, stride: int) -> Launch:
    """Sums partials `stride` apart, from the start of `parts`, into `out` (E, …)."""
    experts = out.shape[0]
    width = out.numel() // max(1, experts)
    block = 256
    blocks = ceil_div(width, block)
    arguments = {
        "parts": parts, "tile_start": tiles.start, "out": out, "WIDTH": width, "STRIDE": stride, "BLOCKS": blocks,
        "TILES": tiles.bound, "BLOCK": block,
    }  # fmt: skip
    return Launch(_sum_parts, (experts * blocks,), arguments)


def weight_gradient(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    assignments: int,
    like: Tensor,
    bias: Tensor | None,
    machine: Machine,
    **options: object,
) -> tuple[Tensor, Tensor | None]:
    """dW (E, N, K) and db (E, N) in the dtypes of `like` and `bias`; split over tokens where experts are few."""
    from . import routing

    experts, n, k = offsets.numel() - 1, dy.shape[1], x.shape[1]
    config = configs.dw(machine, n, k, x.element_size())
    programs = ceil_div(n, config["BN"]) * ceil_div(k, config["BK"])
    dw = torch.empty(experts, n, k, dtype=like.dtype, device=x.device)
    db = None if bias is None else torch.empty(experts, n, dtype=bias.dtype, device=x.device)
    rows = rows_per_share(machine, assignments, programs) if experts * programs < 4 * machine.processors else 0
    if not rows:
        plan_dw(dy, x, offsets, dw, db, machine, **options).run()
        return dw, db
    tiles = routing.tiles(offsets, assignments, rows)
    wide = {"dtype": torch.float32, "device": x.device}
    dw_parts = torch.empty(tiles.bound, n, k, **wide)
    db_parts = None if bias is None else torch.empty(tiles.bound, n, **wide)
    plan_dw(dy, x, offsets, dw_parts, db_parts, machine, tiles=tiles, **options).run()
    plan_sum(dw_parts, tiles, dw, n * k).run()
    if db is not None:
        plan_sum(db_parts, tiles, db, n).run()
    return dw, db
