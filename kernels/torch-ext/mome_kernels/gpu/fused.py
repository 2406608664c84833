"""A feed-forward network per expert in one kernel, for small token widths.

At the widths of vision experts, two grouped matrix products are bound by writing the hidden activations to memory and
reading them back. Here these never leave the chip. A program walks over several row tiles of one expert. Where one
block covers the hidden width, the expert's weights are loaded once and stay in shared memory for all tiles.

The token width D is split into D0 + D1, powers of two (48 = 32 + 16, 96 = 64 + 32), since padding to 64 and 128 would
cost a third more arithmetic and registers.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..weights import ExpertWeights
from . import configs
from .activation import activate
from .launch import Launch, Machine, power_of_two
from .routing import Tiles


@triton.jit
def load_rows(ptr, row, live, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    """ptr[row, FROM : FROM + WIDTH], with zeros past D and for rows that are not live."""
    d = FROM + tl.arange(0, WIDTH)
    if FROM + WIDTH <= D:
        return tl.load(ptr + row[:, None] * D + d[None, :], mask=live[:, None], other=0.0)
    else:
        return tl.load(ptr + row[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_up(up, row, f, D: tl.constexpr, F: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    """W₁ transposed, (WIDTH, BF): columns from FROM on of the rows row + f."""
    d = FROM + tl.arange(0, WIDTH)
    return tl.load(up + (row + f)[None, :] * D + d[:, None], mask=(f < F)[None, :] & (d < D)[:, None], other=0.0)


@triton.jit
def load_down(down, e, f, D: tl.constexpr, F: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    """W₂[e] transposed, (BF, WIDTH): its rows d from FROM on, its columns f."""
    d = FROM + tl.arange(0, WIDTH)
    return tl.load(down + (e * D + d)[None, :] * F + f[:, None], mask=(f < F)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def product(x0, x1, w0, w1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """x @ w over both parts of D.

    The second part has its own accumulator: some Triton versions miscompile two dots into one accumulator for sm_103.
    """
    z = tl.dot(x0, w0, input_precision=PRECISION)
    if D1 > 0:
        z += tl.dot(x1, w1, input_precision=PRECISION)
    return z


@triton.jit
def _mlp(
    x, up, up_bias, down, down_bias, weights_TK, slots, out, tile_expert, tile_row, offsets, ROWS,
    PER_TOKEN: tl.constexpr, D: tl.constexpr, F: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr,
    BF: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, SCATTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[row] = W₂ a(W₁ x[token] + b₁) + b₂ in expert order; with SCATTER out[token], times the routing weight."""
    tile = tl.program_id(0)
    e = tl.load(tile_expert + tile).to(tl.int64)
    if e < 0:
        return
    first = tl.load(tile_row + tile)
    last = first + tl.minimum(ROWS, tl.load(offsets + e + 1) - first)
    SINGLE: tl.constexpr = BF >= F
    WIDTH: tl.constexpr = 2 * F if GATED else F
    P1: tl.constexpr = D1 if D1 > 0 else 16
    unit = e * WIDTH
    if SINGLE:
        f = tl.arange(0, BF)
        w0 = load_up(up, unit, f, D, F, 0, D0)
        w1 = load_up(up, unit, f, D, F, D0, P1)
        if GATED:
            v0 = load_up(up, unit + F, f, D, F, 0, D0)
            v1 = load_up(up, unit + F, f, D, F, D0, P1)
        u0 = load_down(down, e, f, D, F, 0, D0)
        u1 = load_down(down, e, f, D, F, D0, P1)
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, P1)
    for start in range(first, last, BM):
        row = start + tl.arange(0, BM)
        live = row < last
        slot = tl.load(slots + row, mask=live, other=0).to(tl.int64)
        token = slot // PER_TOKEN
        x0 = load_rows(x, token, live, D, 0, D0)
        x1 = load_rows(x, token, live, D, D0, P1)
        acc0 = tl.zeros([BM, D0], tl.float32)
        acc1 = tl.zeros([BM, P1], tl.float32)
        for base in range(0, F, BF):
            if not SINGLE:
                f = base + tl.arange(0, BF)
                w0 = load_up(up, unit, f, D, F, 0, D0)
                w1 = load_up(up, unit, f, D, F, D0, P1)
                u0 = load_down(down, e, f, D, F, 0, D0)
                u1 = load_down(down, e, f, D, F, D0, P1)
            z = product(x0, x1, w0, w1, D1, PRECISION)
            if up_bias is not None:
                z += tl.load(up_bias + unit + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
            h = activate(z, ACT)
            if GATED:
                if not SINGLE:
                    v0 = load_up(up, unit + F, f, D, F, 0, D0)
                    v1 = load_up(up, unit + F, f, D, F, D0, P1)
                z = product(x0, x1, v0, v1, D1, PRECISION)
                if up_bias is not None:
                    z += tl.load(up_bias + unit + F + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
                h = h * z
            h = h.to(x0.dtype)
            acc0 = tl.dot(h, u0, acc0, input_precision=PRECISION)
            if D1 > 0:
                acc1 = tl.dot(h, u1, acc1, input_precision=PRECISION)
        if down_bias is not None:
            acc0 += tl.load(down_bias + e * D + d0, mask=d0 < D, other=0.0).to(tl.float32)[None, :]
            if D1 > 0:
                acc1 += tl.load(down_bias + e * D + d1, mask=d1 < D, other=0.0).to(tl.float32)[None, :]
        target = row.to(tl.int64)
        if SCATTER:
            target = token
            weight = tl.load(weights_TK + slot, mask=live, other=0.0).to(tl.float32)[:, None]
            acc0 *= weight
            acc1 *= weight
        tl.store(out + target[:, None] * D + d0[None, :], acc0, mask=live[:, None] & (d0 < D)[None, :])
        if D1 > 0:
            tl.store(out + target[:, None] * D + d1[None, :], acc1, mask=live[:, None] & (d1 < D)[None, :])


def parts_of(d: int) -> tuple[int, int]:
    """D0 and D1, powers of two of at least 16 whose sum covers d; D1 is 0 where one power of two suffices."""
    whole = max(16, power_of_two(d))
    low = whole // 2
    if whole == d or low < 16 or d <= low:
        return whole, 0
    rest = max(16, power_of_two(d - low))
    return (whole, 0) if low + rest >= whole else (low, rest)


def constants(
    x: Tensor, weights_TK: Tensor, experts: ExpertWeights, config: dict[str, Any], machine: Machine
) -> dict[str, Any]:
    """The constants that all fused kernels take. `whole` in the configuration asks for one padded part of D."""
    d = experts.out_width
    d0, d1 = (max(16, power_of_two(d)), 0) if config.get("whole") else parts_of(d)
    return {
        "PER_TOKEN": weights_TK.shape[1], "D": d, "F": experts.hidden_width, "D0": d0, "D1": d1, "BM": config["BM"],
        "BF": config["BF"], "ACT": experts.activation, "GATED": experts.gated,
        "PRECISION": configs.precision(x, machine),
    }  # fmt: skip


def config_of(kernel: str, x: Tensor, experts: ExpertWeights, machine: Machine) -> dict[str, Any]:
    """The configuration of a fused kernel. Raises ValueError where the table has none for these widths."""
    d, f = experts.out_width, experts.hidden_width
    config = configs.fused(machine, kernel, d, f, x.element_size(), experts.gated)
    if config is None:
        raise ValueError(f"configs of {machine.arch} have no row of {kernel} for width {d} and hidden width {f}")
    return config


def plan_forward(
    x: Tensor, experts: ExpertWeights, weights_TK: Tensor, slots: Tensor, offsets: Tensor, tiles: Tiles, out: Tensor,
    machine: Machine, *, scatter: bool,
) -> Launch:  # fmt: skip
    """A launch of the fused forward kernel over `tiles` of `rows_per_program` rows."""
    config = config_of("mlp", x, experts, machine)
    arguments = {
        "x": x, "up": experts.up, "up_bias": experts.up_bias, "down": experts.down, "down_bias": experts.down_bias,
        "weights_TK": weights_TK, "slots": slots, "out": out, "tile_expert": tiles.expert, "tile_row": tiles.row,
        "offsets": offsets, "ROWS": tiles.rows, "SCATTER": scatter,
        **constants(x, weights_TK, experts, config, machine),
    }  # fmt: skip
    return Launch(_mlp, (tiles.bound,), arguments, config["num_warps"], config["num_stages"])


def rows_per_program(machine: Machine, config: dict[str, Any], assignments: int) -> int:
    """Rows that one program walks over.

    More rows load the weights less often. The bound leaves every multiprocessor twice the programs it can run.
    """
    even = assignments // (machine.processors * config["per_processor"] * 2)
    return config["BM"] * max(1, min(config["walk"], even // config["BM"]))
