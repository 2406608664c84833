"""Gradients of the matrices of grouped linear layers.

They are sums over an expert's rows. Where experts are few, the rows are split between programs, and the partial sums
are added by a second kernel (a split-K product).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, routing
from .launch import Launch, Machine, ceil_div, power_of_two
from .routing import Tiles


@triton.jit
def _grouped_dw(
    dy, x, weights_TK, slots, tile_expert, tile_row, offsets, dw, db, N, K, ROWS, TILES_N, TILES_K,
    PER_TOKEN: tl.constexpr, SPLIT: tl.constexpr, GATHER_Y: tl.constexpr, GATHER_X: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW = Σ weight · dy xᵀ over an expert's rows, or with SPLIT over one tile of them into a float32 partial sum.

    Every program stores its result; an expert without rows gets zeros.
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
        high = low + tl.minimum(ROWS, tl.load(offsets + e + 1) - low)
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
        if GATHER_Y or GATHER_X or (weights_TK is not None):
            slot = tl.load(slots + row, mask=live, other=0).to(tl.int64)
        from_y = slot // PER_TOKEN if GATHER_Y else row64
        from_x = slot // PER_TOKEN if GATHER_X else row64
        y = tl.load(dy + from_y[:, None] * N + n[None, :], mask=live[:, None] & (n < N)[None, :], other=0.0)
        rows = tl.load(x + from_x[:, None] * K + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
        if weights_TK is not None:
            weight = tl.load(weights_TK + slot, mask=live, other=0.0).to(tl.float32)
            scaled = y.to(tl.float32) * weight[:, None]
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


@triton.jit
def _weighted_row_sums(
    dy, weights_TK, slots, tile_expert, tile_row, offsets, parts, ROWS, N, BLOCKS_N, PER_TOKEN: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Σ weight · dy[token] over the rows of a tile; every tile has its own output row."""
    tile = (tl.program_id(0) // BLOCKS_N).to(tl.int64)
    n = (tl.program_id(0) % BLOCKS_N) * BN + tl.arange(0, BN)
    e = tl.load(tile_expert + tile)
    if e < 0:
        return
    first = tl.load(tile_row + tile)
    last = first + tl.minimum(ROWS, tl.load(offsets + e + 1) - first)
    total = tl.zeros([BT, BN], tl.float32)
    for start in range(first, last, BT):
        row = start + tl.arange(0, BT)
        live = row < last
        slot = tl.load(slots + row, mask=live, other=0).to(tl.int64)
        weight = tl.load(weights_TK + slot, mask=live, other=0.0).to(tl.float32)
        at = dy + (slot // PER_TOKEN)[:, None] * N + n[None, :]
        total += weight[:, None] * tl.load(at, mask=live[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
    tl.store(parts + tile * N + n, tl.sum(total, axis=0), mask=n < N)


def plan_weighted_row_sums(
    dy: Tensor, weights_TK: Tensor, slots: Tensor, tiles: Tiles, offsets: Tensor, parts: Tensor
) -> Launch:
    """Partial sums of the gradient of a bias that is added before the routing weight is applied.

    dy is (T, N); `parts` (bound, N) float32 has one row per tile.
    """
    n = dy.shape[1]
    bn = min(64, max(16, power_of_two(n)))
    arguments = {
        "dy": dy, "weights_TK": weights_TK, "slots": slots, "tile_expert": tiles.expert, "tile_row": tiles.row,
        "offsets": offsets, "parts": parts, "ROWS": tiles.rows, "N": n, "BLOCKS_N": ceil_div(n, bn),
        "PER_TOKEN": weights_TK.shape[1], "BT": 8192 // bn, "BN": bn,
    }  # fmt: skip
    return Launch(_weighted_row_sums, (tiles.bound * ceil_div(n, bn),), arguments, num_warps=8)


@triton.jit(do_not_specialize=["TILES"])
def _sum_parts(parts, tile_start, out, WIDTH, STRIDE, BLOCKS, TILES, BLOCK: tl.constexpr):
    """out[e] = the partial sums of expert e, added in their order; zeros where it has none."""
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
    per_token: int = 1,
    weights_TK: Tensor | None = None,
    gather_y: bool = False,
    gather_x: bool = False,
) -> Launch:
    """A launch of the dW kernel: into (E, N, K), or with `tiles` into partial sums (bound, N, K) in float32."""
    n, k = dy.shape[1], x.shape[1]
    config = configs.dw(machine, n, k, x.element_size())
    tiles_n, tiles_k = ceil_div(n, config["BN"]), ceil_div(k, config["BK"])
    parts = offsets.numel() - 1 if tiles is None else tiles.bound
    arguments = {
        "dy": dy, "x": x, "weights_TK": weights_TK, "slots": slots,
        "tile_expert": None if tiles is None else tiles.expert, "tile_row": None if tiles is None else tiles.row,
        "offsets": offsets, "dw": dw, "db": db, "N": n, "K": k,
        "ROWS": 0 if tiles is None else tiles.rows, "TILES_N": tiles_n, "TILES_K": tiles_k, "PER_TOKEN": per_token,
        "SPLIT": tiles is not None, "GATHER_Y": gather_y, "GATHER_X": gather_x, "BT": config["BT"],
        "BN": config["BN"], "BK": config["BK"], "PRECISION": configs.precision(x, machine),
    }  # fmt: skip
    return Launch(_grouped_dw, (parts * tiles_n * tiles_k,), arguments, config["num_warps"], config["num_stages"])


def rows_per_split(machine: Machine, assignments: int, programs: int, least: int = 256) -> int:
    """Rows of one partial sum of dW, such that every multiprocessor gets about four programs; 0 means: do not split.

    The number depends on shapes and the device alone, never on timing, so that a rerun adds in the same order.
    """
    wanted = 4 * machine.processors
    if programs >= wanted or assignments <= least:
        return 0
    return max(least, ceil_div(ceil_div(assignments * programs, wanted), 64) * 64)


def plan_sum(parts: Tensor, tiles: Tiles, out: Tensor, stride: int) -> Launch:
    """A launch that adds partial sums into `out` (E, …); the first begins `parts`, the others follow `stride` apart."""
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
    """dW (E, N, K) and db (E, N) in the dtypes of `like` and `bias`; the rows are split where experts are few."""
    experts, n, k = offsets.numel() - 1, dy.shape[1], x.shape[1]
    config = configs.dw(machine, n, k, x.element_size())
    programs = ceil_div(n, config["BN"]) * ceil_div(k, config["BK"])
    dw = torch.empty(experts, n, k, dtype=like.dtype, device=x.device)
    db = None if bias is None else torch.empty(experts, n, dtype=bias.dtype, device=x.device)
    height = rows_per_split(machine, assignments, programs) if experts * programs < 4 * machine.processors else 0
    if not height:
        plan_dw(dy, x, offsets, dw, db, machine, **options).run()
        return dw, db
    tiles = routing.tiles(offsets, assignments, height)
    wide = {"dtype": torch.float32, "device": x.device}
    dw_parts = torch.empty(tiles.bound, n, k, **wide)
    db_parts = None if bias is None else torch.empty(tiles.bound, n, **wide)
    plan_dw(dy, x, offsets, dw_parts, db_parts, machine, tiles=tiles, **options).run()
    plan_sum(dw_parts, tiles, dw, n * k).run()
    if db is not None:
        plan_sum(db_parts, tiles, db, n).run()
    return dw, db
