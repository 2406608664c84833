"""Launches of every shipped configuration, planned on meta tensors as on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mome_kernels.gpu import configs, fused, fused_backward, grouped_gradient, grouped_linear, head, routing, rows
from mome_kernels.gpu.launch import Launch, Machine
from mome_kernels.weights import ExpertWeights, HeadWeights

EXPERTS, PER_TOKEN, TOKENS = 8, 2, 20000


def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def fused_launch(machine: Machine, kernel: str, d: int, f: int, gated: bool, dtype: torch.dtype) -> Launch:
    """A fused kernel at token width d and hidden width f, with biases and the activation with the most instructions."""
    width = 2 * f if gated else f
    x, y = new(TOKENS, d, dtype=dtype), new(TOKENS * PER_TOKEN, d, dtype=dtype)
    experts = ExpertWeights(
        new(EXPERTS, width, d, dtype=dtype), new(EXPERTS, width, dtype=dtype), new(EXPERTS, d, f, dtype=dtype),
        new(EXPERTS, d, dtype=dtype), "gelu", gated,
    )  # fmt: skip
    weights_TK = new(TOKENS, PER_TOKEN, dtype=torch.float32)
    slots, offsets = new(TOKENS * PER_TOKEN, dtype=torch.int32), new(EXPERTS + 1, dtype=torch.int32)
    _, tiles = routing.plan_tiles(offsets, TOKENS * PER_TOKEN, 512)
    sorted_rows = (experts, weights_TK, slots, offsets, tiles)
    if kernel == "mlp":
        return fused.plan_forward(x, *sorted_rows, y, machine, scatter=False)
    if kernel == "mlp_dx":
        return fused_backward.plan_dx(x, x, *sorted_rows, y, weights_TK, machine, scatter=False)
    parts = new(tiles.bound, width * d + d * f + width + d, dtype=torch.float32)
    return fused_backward.plan_dw(x, x, *sorted_rows, parts, machine)


def narrow_launches(machine: Machine) -> Iterator[Launch]:
    """The fused weight gradient at widths between the bounds of rows, in two parts where its row does not pad."""
    for d in (48, 96):
        if configs.fused(machine, "mlp_dw", d, 4 * d, 2, False) is not None:
            yield fused_launch(machine, "mlp_dw", d, 4 * d, False, torch.bfloat16)


def linear_launch(
    machine: Machine, n: int, k: int, gated: bool, epilogue: bool, dtype: torch.dtype, transpose: bool = False,
    gather: bool = True,
) -> Launch:  # fmt: skip
    """The grouped linear kernel: gathered, with bias and kept z where there is an epilogue."""
    columns = 2 * n if gated else n
    x = new(TOKENS if gather else TOKENS * PER_TOKEN, k, dtype=dtype)
    slots = new(TOKENS * PER_TOKEN, dtype=torch.int32)
    weight = new(EXPERTS, k, columns, dtype=dtype) if transpose else new(EXPERTS, columns, k, dtype=dtype)
    bias, offsets = new(EXPERTS, columns, dtype=dtype), new(EXPERTS + 1, dtype=torch.int32)
    _, tiles = routing.plan_tiles(offsets, TOKENS * PER_TOKEN, 128)
    out, z = new(TOKENS * PER_TOKEN, n, dtype=dtype), new(TOKENS * PER_TOKEN, columns, dtype=dtype)
    return grouped_linear.plan_linear(
        x, weight, None if transpose else bias, tiles, offsets, out, machine, slots=slots, per_token=PER_TOKEN,
        gather=gather, gated=gated, activation="gelu" if epilogue else "none", z_out=z if epilogue else None,
        transpose=transpose,
    )  # fmt: skip


def dw_launch(machine: Machine, n: int, k: int, dtype: torch.dtype) -> Launch:
    """The gradient of a matrix, split over tokens, with routing weights and bias."""
    dy, x = new(TOKENS, n, dtype=dtype), new(TOKENS * PER_TOKEN, k, dtype=dtype)
    slots, offsets = new(TOKENS * PER_TOKEN, dtype=torch.int32), new(EXPERTS + 1, dtype=torch.int32)
    weights_TK = new(TOKENS, PER_TOKEN, dtype=torch.float32)
    _, tiles = routing.plan_tiles(offsets, TOKENS * PER_TOKEN, 512)
    dw, db = new(tiles.bound, n, k, dtype=torch.float32), new(tiles.bound, n, dtype=torch.float32)
    return grouped_gradient.plan_dw(
        dy,
        x,
        offsets,
        dw,
        db,
        machine,
        tiles=tiles,
        slots=slots,
        per_token=PER_TOKEN,
        weights_TK=weights_TK,
        gather_y=True,
    )


def row_launch(machine: Machine, kernel: str, row: dict) -> Launch:
    """A row of a table at its own bounds."""
    bounds = row["up_to"]
    dtype = torch.bfloat16 if bounds.get("bytes", 4) == 2 else torch.float32
    gated = bool(bounds.get("gated", 1))
    if kernel in ("mlp", "mlp_dx", "mlp_dw"):
        return fused_launch(machine, kernel, bounds["d"], bounds.get("f", 4 * bounds["d"]), gated, dtype)
    odd = bounds.get("odd", 1)
    n, k = bounds.get("n", 1024) - 13 * odd, bounds.get("k", 1024) - 13 * odd
    if kernel == "dw":
        return dw_launch(machine, n, k, dtype)
    chosen = configs.linear(machine, n, k, dtype.itemsize, gated, bool(bounds.get("epilogue", 1)))
    assert chosen is row, (chosen, row)
    return linear_launch(machine, n, k, gated, bool(bounds.get("epilogue", 1)), dtype)


def linear_variants(machine: Machine, row: dict) -> Iterator[Launch]:
    """Launches without a gate that use this row of `linear`: dX, and an inner length that BK does not divide."""
    bounds = row["up_to"]
    size, odd = bounds.get("bytes", 4), bounds.get("odd", 1)
    dtype = torch.bfloat16 if size == 2 else torch.float32
    n, k = bounds.get("n", 1024) - 13 * odd, bounds.get("k", 1024) - 13 * odd
    if configs.linear(machine, n, k, size, False, False) is row:
        yield linear_launch(machine, n, k, False, False, dtype, transpose=True)
    epilogue = bool(bounds.get("epilogue", 1))
    if not odd and configs.linear(machine, n, 1040, size, False, epilogue) is row:
        yield linear_launch(machine, n, 1040, False, epilogue, dtype)


def head_launches(machine: Machine, channels: int, scales: int) -> list[Launch]:
    """Every kernel of the fusion head."""
    batch, prompts, voxels = 2, 33, 96**3 + 1
    single = lambda *shape: new(*shape, dtype=torch.float32)  # noqa: E731
    features, out = single(batch, scales, channels, voxels), single(batch, prompts, voxels)
    square, row = (batch, prompts, channels, channels), (batch, prompts, channels)
    weights = HeadWeights(
        single(prompts, channels), single(prompts, scales), single(*square), single(*row), single(*square),
        single(*row), single(*row), single(batch, prompts), top_k=0, negative_slope=0.1,
    )  # fmt: skip
    backward, _ = head.plan_backward(out, features, weights, features, machine)
    return [head.plan_forward(out, features, weights, machine), *backward]


@contextmanager
def tma(*rows: dict) -> Iterator[None]:
    """Switches TMA on in these rows of a table."""
    before = [dict(row) for row in rows]
    for row in rows:
        row["tma"] = 1
    try:
        yield
    finally:
        for row, old in zip(rows, before, strict=True):
            row.clear()
            row.update(old)


def tma_launches(machine: Machine, row: dict) -> Iterator[Launch]:
    """Launches of this row of `linear` with TMA: for the matrix alone, for the rows too, and dX."""
    bounds = row["up_to"]
    size, odd = bounds.get("bytes", 4), bounds.get("odd", 1)
    dtype = torch.bfloat16 if size == 2 else torch.float32
    n, k = bounds.get("n", 1024) - 8 * odd, bounds.get("k", 1024) - 8 * odd  # 16-byte rows
    gated, epilogue = bool(bounds.get("gated", 1)), bool(bounds.get("epilogue", 1))
    with tma(row):
        for gather in (True, False):
            yield linear_launch(machine, n, k, gated, epilogue, dtype, gather=gather)
        if configs.linear(machine, n, k, size, False, False) is row:
            yield linear_launch(machine, n, k, False, False, dtype, transpose=True, gather=False)


def every_row(arch: str) -> Iterator[tuple[str, int]]:
    """(kernel, index) of every row of an architecture's table."""
    for kernel, table in configs.table(arch).items():
        for index in range(len(table)):
            yield kernel, index


def small_launches(machine: Machine) -> dict[str, Launch]:
    """Routing, combine and the row-wise kernels, which have one configuration."""
    dtype = torch.bfloat16
    ids = new(TOKENS, PER_TOKEN, dtype=torch.int64)
    launches, order, _ = routing.plan_route(ids, EXPERTS, torch.int32)
    count, scan, scatter = launches
    n, f, d = TOKENS * PER_TOKEN, 384, 96
    weights_TK, slots = new(TOKENS, PER_TOKEN, dtype=torch.float32), order.permutation
    x, h, z = new(TOKENS, d, dtype=dtype), new(n, f, dtype=dtype), new(n, 2 * f, dtype=dtype)
    y, bias = new(n, d, dtype=dtype), new(EXPERTS, d, dtype=dtype)
    tile_launch, tiles = routing.plan_tiles(order.offsets, n, 512)
    parts = new(tiles.bound, d * f, dtype=torch.float32)
    return {
        "count": count,
        "scan": scan,
        "scatter": scatter,
        "tile_map": tile_launch,
        "combine": rows.plan_combine(y, weights_TK, order.inverse, PER_TOKEN, x),
        "combine_backward": rows.plan_combine_backward(x, y, weights_TK, order.inverse, y, weights_TK),
        "activation_backward": rows.plan_activation_backward(
            h, z, h, z, x, bias, ids, slots, weights_TK, weights_TK, "gelu", True
        ),
        "row_dot": rows.plan_row_dot(y, x, x, bias, ids, slots, weights_TK),
        "weighted_row_sums": grouped_gradient.plan_weighted_row_sums(x, weights_TK, slots, tiles, order.offsets, parts),
        "sum_parts": grouped_gradient.plan_sum(parts, tiles, new(EXPERTS, d, f, dtype=dtype), d * f),
    }
