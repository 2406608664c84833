"""Assignments sorted by expert, and the tiles of rows that programs work on.

The counting sort is stable and deterministic. Its three launches (count, scan, scatter) replace two argsorts, and the
host does not wait for the device, so that a CUDA graph can capture them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .interpreter import interpreting
from .launch import Launch, ceil_div, power_of_two


@triton.jit(do_not_specialize=["N", "BLOCKS"])
def _count(ids, block_counts, N, E, BLOCKS, EP: tl.constexpr, BLOCK: tl.constexpr):
    """Counts each expert's assignments in a block: block_counts (E + 1, BLOCKS), where row E counts invalid ids."""
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
    """Replaces an expert's block counts by exclusive prefix sums and stores its total; `valid` becomes 1 or 0."""
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
    """A position is the expert's offset, plus its assignments in earlier blocks and earlier in this block."""
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
    """Divides every expert's rows into tiles of ROWS; entries past the last tile get expert −1."""
    expert = tl.arange(0, EP)
    low = tl.load(offsets + expert, mask=expert < E, other=0)
    high = tl.load(offsets + expert + 1, mask=expert < E, other=0)
    tiles = tl.where(high > low, (high - low - 1) // ROWS + 1, 0)
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


@dataclass(slots=True)
class SortedAssignments:
    """Counts (E,), offsets (E + 1,), and permutation and inverse (N,) of N = T · K assignments in expert order."""

    counts: Tensor
    offsets: Tensor
    permutation: Tensor
    inverse: Tensor


@dataclass(slots=True)
class Tiles:
    """Tiles of at most `rows` rows of one expert, in expert order.

    Attributes:
        expert: (bound,) int32, the expert of a tile, −1 past the last tile.
        row: (bound,) int32, the first row of a tile.
        start: (E + 1,) int32, the first tile of an expert.
        rows: The most rows of a tile.
        bound: The most tiles that there can be; the host does not know the exact number.
    """

    expert: Tensor
    row: Tensor
    start: Tensor
    rows: int
    bound: int


def plan_route(
    ids_TK: Tensor, num_experts: int, index_dtype: torch.dtype
) -> tuple[list[Launch], SortedAssignments, Tensor]:
    """The three launches, the tensors that they fill, and the flag that every id is in range."""
    checks.ids(ids_TK)  # checked again, since sizes can be symbolic in a compiled or exported program
    flat = ids_TK.reshape(-1).contiguous()
    n, ep = flat.numel(), power_of_two(num_experts + 1)
    block = max(32, min(1024, 8192 // ep))
    blocks = max(1, ceil_div(n, block))
    new = lambda *shape, dtype=torch.int32: torch.empty(*shape, dtype=dtype, device=ids_TK.device)  # noqa: E731
    block_counts, valid = new(num_experts + 1, blocks), new(1)
    order = SortedAssignments(
        new(num_experts), new(num_experts + 1), new(n, dtype=index_dtype), new(n, dtype=index_dtype)
    )
    sizes = {"N": n, "E": num_experts, "BLOCKS": blocks}
    count = {"ids": flat, "block_counts": block_counts, **sizes, "EP": ep, "BLOCK": block}
    scan = {"block_counts": block_counts, "counts": order.counts, "valid": valid, "E": num_experts, "BLOCKS": blocks}
    scatter = {
        **count,
        "counts": order.counts,
        "offsets": order.offsets,
        "permutation": order.permutation,
        "inverse": order.inverse,
    }
    launches = [
        Launch(_count, (blocks,), count),
        Launch(_scan, (num_experts + 1,), {**scan, "CHUNK": 1024}),
        Launch(_scatter, (blocks,), scatter),
    ]
    return launches, order, valid


def route(ids_TK: Tensor, num_experts: int, index_dtype: torch.dtype = torch.int32) -> SortedAssignments:
    """Sorts assignments by expert. An id out of range is a device-side assertion; the host does not wait for it."""
    launches, order, valid = plan_route(ids_TK, num_experts, index_dtype)
    for launch in launches:
        launch.run()
    if interpreting():
        if not bool(valid):
            raise ValueError(f"ids_TK has ids outside [0, {num_experts})")
    else:
        torch._assert_async(valid, f"ids_TK has ids outside [0, {num_experts})")
    return order


def plan_tiles(offsets: Tensor, assignments: int, rows: int) -> tuple[Launch, Tiles]:
    """A launch that fills the tiles of `rows` rows for assignments with these offsets."""
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
    """Runs `plan_tiles` and returns the tiles."""
    launch, result = plan_tiles(offsets, assignments, rows)
    launch.run()
    return result
