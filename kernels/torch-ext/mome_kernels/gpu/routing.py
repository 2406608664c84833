"""Assignments sorted by expert with a counting sort, and the tiles of rows that programs work on.

Stable, deterministic, no host synchronisation, so that a CUDA graph can capture it: three launches (count, scan,
scatter) instead of two argsorts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .launch import Launch, ceil_div, interpreting, power_of_two


@triton.jit(do_not_specialize=["N", "BLOCKS"])
def _count(ids, block_counts, N, E, BLOCKS, EP: tl.constexpr, BLOCK: tl.constexpr):
    """block_counts (E + 1, BLOCKS): how often each expert occurs in a block; row E counts ids out of range."""
    block = tl.program_id(0)
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(ids + i, mask=i < N, other=0)
    e = tl.where((e < 0) | (e >= E), E, e).to(tl.int32)
    expert = tl.arange(0, EP)
    hits = (e[:, None] == expert[None, :]) & (i < N)[:, None]
    row = block_counts + expert.to(tl.int64) * BLOCKS + block
    tl.store(row, tl.sum(hits.to(tl.int32), axis=0), mask=expert <= E)


@triton.jit(do_not_specialize=["BLOCKS"])
def _scan(block_counts, counts, valid, E, BLOCKS, CHUNK: tl.constexpr):
    """Turns an expert's block counts into exclusive prefix sums and stores its total; `valid` is 1 or 0."""
    expert = tl.program_id(0)
    row = block_counts + expert.to(tl.int64) * BLOCKS
    total = tl.zeros([1], tl.int32)
    for start in range(0, BLOCKS, CHUNK):
        i = start + tl.arange(0, CHUNK)
        n = tl.load(row + i, mask=i < BLOCKS, other=0)
        tl.store(row + i, total + tl.cumsum(n, 0) - n, mask=i < BLOCKS)
        total += tl.sum(n, axis=0)
    one = tl.arange(0, 1)
    tl.store(counts + expert + one, total, mask=(one + expert) < E)
    tl.store(valid + one, (total == 0).to(tl.int32), mask=(one + expert) == E)


@triton.jit(do_not_specialize=["N", "BLOCKS"])
def _scatter(
    ids, block_counts, counts, offsets, permutation, inverse, N, E, BLOCKS, EP: tl.constexpr, BLOCK: tl.constexpr
):
    """Position = the expert's offset + hits in earlier blocks + earlier hits in this block."""
    block = tl.program_id(0)
    expert = tl.arange(0, EP)
    n = tl.load(counts + expert, mask=expert < E, other=0)
    start = tl.cumsum(n, 0) - n
    if block == 0:
        tl.store(offsets + expert, start, mask=expert <= E)
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(ids + i, mask=i < N, other=0)
    live = (i < N) & (e >= 0) & (e < E)
    e = tl.where(live, e, E).to(tl.int32)
    hit = (e[:, None] == expert[None, :]).to(tl.int32)
    rank = tl.sum(hit * (tl.cumsum(hit, 0) - 1 + start[None, :]), axis=1)
    before = tl.load(block_counts + e.to(tl.int64) * BLOCKS + block, mask=live, other=0)
    position = (rank + before).to(tl.int64)
    tl.store(permutation + position, i, mask=live)
    tl.store(inverse + i, position, mask=live)


@triton.jit(do_not_specialize=["ROWS"])
def _tile_map(offsets, tile_expert, tile_row, tile_start, E, ROWS, BOUND, EP: tl.constexpr, BLOCK: tl.constexpr):
    """Cuts every expert's rows into tiles of ROWS; tiles past the last have expert −1."""
    expert = tl.arange(0, EP)
    low = tl.load(offsets + expert, mask=expert < E, other=0)
    high = tl.load(offsets + expert + 1, mask=expert < E, other=0)
    tiles = (high - low + ROWS - 1) // ROWS
    end = tl.cumsum(tiles, 0)
    if tl.program_id(0) == 0:
        tl.store(tile_start + expert, end - tiles, mask=expert <= E)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    past = end[None, :] <= t[:, None]
    owner = tl.sum(past.to(tl.int32), axis=1)
    first = tl.max(tl.where(past, end[None, :], 0), axis=1)
    live = t < tl.max(end, axis=0)
    row = tl.load(offsets + owner, mask=live, other=0) + (t - first) * ROWS
    tl.store(tile_expert + t, tl.where(live, owner, -1), mask=t < BOUND)
    tl.store(tile_row + t, row, mask=t < BOUND)


@dataclass(frozen=True)
class Routing:
    """counts (E,), offsets (E + 1,), permutation and inverse (N,) of N = T·K assignments."""

    counts: Tensor
    offsets: Tensor
    permutation: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class Tiles:
    """Tiles of at most `rows` sorted rows of one expert.

    expert, row (bound,) int32: a tile's expert, −1 past the last, and first row; start (E + 1,): an expert's first
    tile. `bound` is the largest number of tiles that the host must allow for.
    """

    expert: Tensor
    row: Tensor
    start: Tensor
    rows: int
    bound: int


def plan_route(ids: Tensor, num_experts: int, index_dtype: torch.dtype) -> tuple[list[Launch], Routing, Tensor]:
    """The three launches, what they fill, and the flag that every id is within range."""
    checks.ids(ids)  # again: what was compiled or exported did not know the sizes
    flat = ids.reshape(-1).contiguous()
    n, ep = flat.numel(), power_of_two(num_experts + 1)
    block = max(32, min(1024, 8192 // ep))
    blocks = max(1, ceil_div(n, block))
    new = lambda *shape, dtype=torch.int32: torch.empty(*shape, dtype=dtype, device=ids.device)  # noqa: E731
    block_counts, valid = new(num_experts + 1, blocks), new(1)
    routing = Routing(new(num_experts), new(num_experts + 1), new(n, dtype=index_dtype), new(n, dtype=index_dtype))
    shared = {"N": n, "E": num_experts, "BLOCKS": blocks}
    count = {"ids": flat, "block_counts": block_counts, **shared, "EP": ep, "BLOCK": block}
    scan = {"block_counts": block_counts, "counts": routing.counts, "valid": valid, "E": num_experts, "BLOCKS": blocks}
    scatter = {
        **count,
        "counts": routing.counts,
        "offsets": routing.offsets,
        "permutation": routing.permutation,
        "inverse": routing.inverse,
    }
    launches = [
        Launch(_count, (blocks,), count),
        Launch(_scan, (num_experts + 1,), {**scan, "CHUNK": 1024}),
        Launch(_scatter, (blocks,), scatter),
    ]
    return launches, routing, valid


def route(ids: Tensor, num_experts: int, index_dtype: torch.dtype = torch.int32) -> Routing:
    """Sorts assignments by expert. An id out of range is a device-side assertion, so that nothing waits for it."""
    launches, routing, valid = plan_route(ids, num_experts, index_dtype)
    for launch in launches:
        launch.run()
    if interpreting():
        if not bool(valid):
            raise ValueError(f"expert_ids_TK has ids outside [0, {num_experts})")
    else:
        torch._assert_async(valid, f"expert_ids_TK has ids outside [0, {num_experts})")
    return routing


def plan_tiles(offsets: Tensor, assignments: int, rows: int) -> tuple[Launch, Tiles]:
    """Tiles of `rows` rows for sorted assignments."""
    experts = offsets.numel() - 1
    bound = ceil_div(assignments, rows) + min(experts, assignments)
    ep = power_of_two(experts + 1)
    block = max(16, min(256, 8192 // ep))
    new = lambda n: torch.empty(n, dtype=torch.int32, device=offsets.device)  # noqa: E731
    tiles = Tiles(new(bound), new(bound), new(experts + 1), rows, bound)
    arguments = {
        "offsets": offsets,
        "tile_expert": tiles.expert,
        "tile_row": tiles.row,
        "tile_start": tiles.start,
        "E": experts,
        "ROWS": rows,
        "BOUND": bound,
        "EP": ep,
        "BLOCK": block,
    }
    return Launch(_tile_map, (max(1, ceil_div(bound, block)),), arguments), tiles


def tiles(offsets: Tensor, assignments: int, rows: int) -> Tiles:
    """`plan_tiles`, launched."""
    launch, result = plan_tiles(offsets, assignments, rows)
    launch.run()
    return result
