"""Tensors of more than 2³¹ elements, of which a kernel reads and writes a few rows at the far end.

An offset that wraps around would give another address. The other rows are never written, so that they use no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from mome_kernels.gpu import fused, fused_backward, grouped_gradient, grouped_linear, routing, rows
from mome_kernels.gpu.launch import Machine
from mome_kernels.weights import ExpertWeights

MACHINE = Machine("sm_90", 132)
WIDTH, HIDDEN, EXPERTS = 64, 48, 3
TOKENS = 2**31 // WIDTH + 1000
SLOTS = torch.tensor([TOKENS - 1, 3, TOKENS - 700, TOKENS - 2, 0, TOKENS - 999, TOKENS // 2], dtype=torch.int32)
OFFSETS = torch.tensor([0, 3, 3, len(SLOTS)], dtype=torch.int32)


def sparse(*shape: int, dtype: type = np.float16) -> torch.Tensor:
    """Zeros that use no memory until they are written."""
    return torch.from_numpy(np.zeros(shape, dtype))


def far(width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor (tokens, width) with numbers in the rows of `SLOTS`, and those rows alone."""
    few = torch.randn(len(SLOTS), width).half()
    whole = sparse(TOKENS, width)
    whole[SLOTS.long()] = few
    return whole, few


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over largest value."""
    got, expected = got.detach().float(), expected.detach().float()
    return float((got - expected).abs().max() / expected.abs().max())


def linear_cases() -> Iterator[tuple[str, list[float]]]:
    """Rows gathered from and scattered to addresses beyond 2³¹; and the last of many experts."""
    x, few = far()
    matrices, weights_TK = torch.randn(EXPERTS, WIDTH, WIDTH).half() / 8, sparse(TOKENS, 1, dtype=np.float32)
    weights_TK[SLOTS.long()] = torch.rand(len(SLOTS), 1)
    owner = torch.repeat_interleave(torch.arange(EXPERTS), OFFSETS.diff().long())
    out = sparse(TOKENS, WIDTH)
    height = grouped_linear.rows_per_tile(MACHINE, matrices, 2, False, False, False)
    tiles = routing.tiles(OFFSETS, len(SLOTS), height)
    grouped_linear.plan_linear(
        x, matrices, None, tiles, OFFSETS, out, MACHINE, weights_TK=weights_TK, slots=SLOTS, gather=True, scatter=True
    ).run()
    expected = torch.einsum("nk,nfk->nf", few.float(), matrices[owner].float()) * weights_TK[SLOTS.long()]
    yield "linear", [error(out[SLOTS.long()], expected)]

    dy, few_dy = far()
    dw = torch.empty(EXPERTS, WIDTH, WIDTH)
    grouped_gradient.plan_dw(dy, x, OFFSETS, dw, None, MACHINE, slots=SLOTS, gather_y=True, gather_x=True).run()
    products = few_dy.float()[:, :, None] * few.float()[:, None]
    yield "linear weights", [error(dw, torch.zeros_like(dw).index_add(0, owner, products))]

    many = 2**31 // WIDTH**2 + 5
    weights, last = sparse(many, WIDTH, WIDTH), torch.randn(WIDTH, WIDTH).half() / 8
    weights[-1] = last
    offsets, start = sparse(many + 1, dtype=np.int32), sparse(many + 1, dtype=np.int32)
    offsets[-1], start[-1] = len(SLOTS), 1
    one = routing.Tiles(torch.tensor([many - 1]).int(), torch.zeros(1).int(), start, height, 1)
    y = torch.empty(len(SLOTS), WIDTH).half()
    grouped_linear.plan_linear(few, weights, None, one, offsets, y, MACHINE).run()
    yield "linear, many experts", [error(y, few.float() @ last.float().T)]


def mlp_cases() -> Iterator[tuple[str, list[float]]]:
    """The fused layer forward and backward."""
    x, few = far()
    grad, few_grad = far()
    up, down = torch.randn(EXPERTS, HIDDEN, WIDTH).half() / 8, torch.randn(EXPERTS, WIDTH, HIDDEN).half() / 8
    weights_TK = sparse(TOKENS, 1, dtype=np.float32)
    weights_TK[SLOTS.long()] = torch.rand(len(SLOTS), 1)
    owner = torch.repeat_interleave(torch.arange(EXPERTS), OFFSETS.diff().long())
    leaves = [t.float().requires_grad_() for t in (few, weights_TK[SLOTS.long()], up, down)]
    hidden = torch.relu(torch.einsum("nd,nfd->nf", leaves[0], leaves[2][owner]))
    expected = torch.einsum("nf,ndf->nd", hidden, leaves[3][owner]) * leaves[1]
    wanted = torch.autograd.grad(expected, leaves, few_grad.float())

    out, dx, d_weights = sparse(TOKENS, WIDTH), sparse(TOKENS, WIDTH), sparse(TOKENS, 1, dtype=np.float32)
    tiles = routing.tiles(OFFSETS, len(SLOTS), 128)
    sorted_rows = (ExpertWeights(up, None, down, None, "relu", False), weights_TK, SLOTS, OFFSETS, tiles)
    fused.plan_forward(x, *sorted_rows, out, MACHINE, scatter=True).run()
    yield "mlp", [error(out[SLOTS.long()], expected)]
    fused_backward.plan_dx(grad, x, *sorted_rows, dx, d_weights, MACHINE, scatter=True).run()
    yield "mlp tokens", [error(dx[SLOTS.long()], wanted[0]), error(d_weights[SLOTS.long()], wanted[1])]
    parts = torch.empty(tiles.bound, 2 * WIDTH * HIDDEN)
    fused_backward.plan_dw(grad, x, *sorted_rows, parts, MACHINE).run()
    sums, bias = (torch.empty_like(up), torch.empty_like(down)), torch.empty(EXPERTS, WIDTH)
    rest = torch.empty(tiles.bound, WIDTH)
    grouped_gradient.plan_weighted_row_sums(grad, weights_TK, SLOTS, tiles, OFFSETS, rest).run()
    grouped_gradient.plan_sum(rest, tiles, bias, WIDTH).run()
    scaled = few_grad.float() * weights_TK[SLOTS.long()]
    yield "mlp last bias", [error(bias, torch.zeros_like(bias).index_add(0, owner, scaled))]
    for start, total in zip((0, WIDTH * HIDDEN), sums, strict=True):
        grouped_gradient.plan_sum(parts.view(-1)[start:], tiles, total, parts.shape[1]).run()
    yield "mlp weights", [error(*pair) for pair in zip(sums, wanted[2:], strict=True)]


def combine_cases() -> Iterator[tuple[str, list[float]]]:
    """Rows in expert order beyond 2³¹."""
    y, few = far()
    tokens, weights_TK = len(SLOTS), torch.rand(len(SLOTS), 1)
    out, grad = torch.empty(tokens, WIDTH).half(), torch.randn(tokens, WIDTH).half()
    rows.plan_combine(y, weights_TK, SLOTS, 1, out).run()
    dy, d_weights = sparse(TOKENS, WIDTH), torch.empty_like(weights_TK)
    launch = rows.plan_combine_backward(grad, y, weights_TK, SLOTS, dy, d_weights)
    replace(launch, grid=(1,), args={**launch.args, "N": tokens}).run()  # only the rows that are used
    wanted = (few.float() * grad.float()).sum(1, keepdim=True)
    yield "combine", [error(out, few.float() * weights_TK)]
    yield "combine backward", [error(dy[SLOTS.long()], grad.float() * weights_TK), error(d_weights, wanted)]


def cases() -> Iterator[tuple[str, dict[str, object]]]:
    """All cases, in the form that `interpreted_cases` prints."""
    torch.manual_seed(0)
    for group in (linear_cases, mlp_cases, combine_cases):
        for name, errors in group():
            yield f"far {name}", {"errors": errors, "bit_equal": all(e < 1 for e in errors), "dtype": "torch.float16"}
