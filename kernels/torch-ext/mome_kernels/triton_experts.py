"""Feed-forward experts in Triton, fused: gather → GEMM → activation → GEMM → gate, for small token widths.

At the widths of vision experts (16…128) two grouped GEMMs are bound by memory; here the hidden activations never
reach it, forward or backward. A tile of BLOCK_M assignments of one expert is a program; the hidden width is walked
in blocks. Weight gradients are summed over fixed shares of the assignments (SPLIT of them per expert) and then over
the shares: enough programs where experts are few, no atomics, zeros for empty experts, bit-equal reruns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cpu_experts

ACTIVATION_IDS = {"none": 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4}


@triton.jit
def _act(x, ACT: tl.constexpr):
    if ACT == 1:
        return tl.maximum(x, 0.0)
    elif ACT == 2:
        return x * tl.sigmoid(x)
    elif ACT == 3:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == 4:
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return x


@triton.jit
def _act_grad(x, ACT: tl.constexpr):
    if ACT == 1:
        return tl.where(x > 0, 1.0, 0.0)
    elif ACT == 2:
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACT == 3:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == 4:
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _up(x, up_ptr, bias_ptr, first, channel, f, D, F, BIAS: tl.constexpr, PRECISION: tl.constexpr):
    """z (M, BLOCK_F) = x W_upᵀ + b for hidden units `f`, whose rows begin at `first` in (E·width, D)."""
    w = tl.load(
        up_ptr + (first + f)[None, :] * D + channel[:, None], mask=(f < F)[None, :] & (channel < D)[:, None], other=0.0
    )
    z = tl.dot(x, w, input_precision=PRECISION)
    if BIAS:
        z += tl.load(bias_ptr + first + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _forward_kernel(
    x_ptr, gate_ptr, slot_ptr, expert_ptr, row_ptr, end_ptr, up_ptr, ub_ptr, down_ptr, db_ptr, y_ptr,
    K, D, F, OUT,
    ACT: tl.constexpr, GATED: tl.constexpr, UP_BIAS: tl.constexpr, DOWN_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    start, end = tl.load(row_ptr + tile), tl.load(end_ptr + tile)
    if start >= end:
        return
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    row = start + tl.arange(0, BLOCK_M)
    live = row < end
    slot = tl.load(slot_ptr + row, mask=live, other=0).to(tl.int64)
    token, channel, out = slot // K, tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_O)
    x = tl.load(x_ptr + token[:, None] * D + channel[None, :], mask=live[:, None] & (channel < D)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    width = 2 * F if GATED else F
    for base in range(0, F, BLOCK_F):
        f = base + tl.arange(0, BLOCK_F)
        z = _up(x, up_ptr, ub_ptr, expert * width, channel, f, D, F, UP_BIAS, PRECISION)
        h = _act(z, ACT)
        if GATED:
            h = h * _up(x, up_ptr, ub_ptr, expert * width + F, channel, f, D, F, UP_BIAS, PRECISION)
        w = tl.load(
            down_ptr + (expert * OUT + out)[None, :] * F + f[:, None],
            mask=(f < F)[:, None] & (out < OUT)[None, :], other=0.0,
        )  # fmt: skip
        acc += tl.dot(h.to(x.dtype), w, input_precision=PRECISION)
    if DOWN_BIAS:
        acc += tl.load(db_ptr + expert * OUT + out, mask=out < OUT, other=0.0).to(tl.float32)[None, :]
    gate = tl.load(gate_ptr + slot, mask=live, other=0.0).to(tl.float32)
    where = slot[:, None] * OUT + out[None, :]
    tl.store(y_ptr + where, acc * gate[:, None], mask=live[:, None] & (out < OUT)[None, :])


@triton.jit
def _hidden_grad(
    x, dy, gate, up_ptr, ub_ptr, down_ptr, expert, channel, out, f, D, F, OUT,
    ACT: tl.constexpr, GATED: tl.constexpr, UP_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For hidden units `f`: activations h, ungated dh, and the gradients of the two halves before activation."""
    width = 2 * F if GATED else F
    z = _up(x, up_ptr, ub_ptr, expert * width, channel, f, D, F, UP_BIAS, PRECISION)
    w = tl.load(
        down_ptr + (expert * OUT + out)[:, None] * F + f[None, :],
        mask=(out < OUT)[:, None] & (f < F)[None, :],
        other=0.0,
    )
    dh = tl.dot(dy, w, input_precision=PRECISION)
    a = _act(z, ACT)
    if GATED:
        u = _up(x, up_ptr, ub_ptr, expert * width + F, channel, f, D, F, UP_BIAS, PRECISION)
        h = a * u
        d_gate_half = dh * gate[:, None] * u * _act_grad(z, ACT)
        d_up_half = dh * gate[:, None] * a
    else:
        h = a
        d_gate_half = dh * gate[:, None] * _act_grad(z, ACT)
        d_up_half = d_gate_half
    return h, dh, d_gate_half, d_up_half


@triton.jit
def _token_grad_kernel(
    grad_ptr, x_ptr, gate_ptr, slot_ptr, expert_ptr, row_ptr, end_ptr, up_ptr, ub_ptr, down_ptr, db_ptr,
    dx_ptr, dgate_ptr,
    K, D, F, OUT,
    ACT: tl.constexpr, GATED: tl.constexpr, UP_BIAS: tl.constexpr, DOWN_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens, per assignment, and of the gates."""
    tile = tl.program_id(0)
    start, end = tl.load(row_ptr + tile), tl.load(end_ptr + tile)
    if start >= end:
        return
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    row = start + tl.arange(0, BLOCK_M)
    live = row < end
    slot = tl.load(slot_ptr + row, mask=live, other=0).to(tl.int64)
    token, channel, out = slot // K, tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_O)
    x = tl.load(x_ptr + token[:, None] * D + channel[None, :], mask=live[:, None] & (channel < D)[None, :], other=0.0)
    dy = tl.load(grad_ptr + token[:, None] * OUT + out[None, :], mask=live[:, None] & (out < OUT)[None, :], other=0.0)
    gate = tl.load(gate_ptr + slot, mask=live, other=0.0).to(tl.float32)
    dx = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    dgate = tl.zeros([BLOCK_M], dtype=tl.float32)
    width = 2 * F if GATED else F
    for base in range(0, F, BLOCK_F):
        f = base + tl.arange(0, BLOCK_F)
        h, dh, d_first, d_second = _hidden_grad(
            x, dy, gate, up_ptr, ub_ptr, down_ptr, expert, channel, out, f, D, F, OUT, ACT, GATED, UP_BIAS, PRECISION
        )
        dgate += tl.sum(dh * h, axis=1)
        inside = (f < F)[:, None] & (channel < D)[None, :]
        w = tl.load(up_ptr + (expert * width + f)[:, None] * D + channel[None, :], mask=inside, other=0.0)
        dx += tl.dot(d_first.to(x.dtype), w, input_precision=PRECISION)
        if GATED:
            w = tl.load(up_ptr + (expert * width + F + f)[:, None] * D + channel[None, :], mask=inside, other=0.0)
            # a sum of its own: two dots into one accumulator are miscompiled by some Triton versions
            second = tl.dot(d_second.to(x.dtype), w, input_precision=PRECISION)
            dx += second
    if DOWN_BIAS:
        b = tl.load(db_ptr + expert * OUT + out, mask=out < OUT, other=0.0).to(tl.float32)
        dgate += tl.sum(dy.to(tl.float32) * b[None, :], axis=1)
    tl.store(dx_ptr + slot[:, None] * D + channel[None, :], dx, mask=live[:, None] & (channel < D)[None, :])
    tl.store(dgate_ptr + slot, dgate, mask=live)


@triton.jit
def _weight_grad_kernel(
    grad_ptr, x_ptr, gate_ptr, slot_ptr, offset_ptr, up_ptr, ub_ptr, down_ptr,
    dup_ptr, dub_ptr, ddown_ptr, ddb_ptr,
    K, D, F, OUT, E, SPLIT,
    ACT: tl.constexpr, GATED: tl.constexpr, UP_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One share of one expert's assignments, one block of hidden units; every program writes, if only zeros."""
    share, expert = tl.program_id(1), tl.program_id(2).to(tl.int64)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    channel, out = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_O)
    first, last = tl.load(offset_ptr + expert), tl.load(offset_ptr + expert + 1)
    d_up = tl.zeros([BLOCK_F, BLOCK_D], dtype=tl.float32)
    d_up2 = tl.zeros([BLOCK_F, BLOCK_D], dtype=tl.float32)
    d_down = tl.zeros([BLOCK_O, BLOCK_F], dtype=tl.float32)
    d_ub = tl.zeros([BLOCK_F], dtype=tl.float32)
    d_ub2 = tl.zeros([BLOCK_F], dtype=tl.float32)
    d_db = tl.zeros([BLOCK_O], dtype=tl.float32)
    for start in range(first + share * BLOCK_M, last, SPLIT * BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        live = row < last
        slot = tl.load(slot_ptr + row, mask=live, other=0).to(tl.int64)
        token = slot // K
        x = tl.load(
            x_ptr + token[:, None] * D + channel[None, :], mask=live[:, None] & (channel < D)[None, :], other=0.0
        )
        dy = tl.load(
            grad_ptr + token[:, None] * OUT + out[None, :], mask=live[:, None] & (out < OUT)[None, :], other=0.0
        )
        gate = tl.load(gate_ptr + slot, mask=live, other=0.0).to(tl.float32)
        h, dh, d_first, d_second = _hidden_grad(
            x, dy, gate, up_ptr, ub_ptr, down_ptr, expert, channel, out, f, D, F, OUT, ACT, GATED, UP_BIAS, PRECISION
        )
        gated_dy = dy.to(tl.float32) * gate[:, None]
        d_up += tl.dot(tl.trans(d_first.to(x.dtype)), x, input_precision=PRECISION)
        d_down += tl.dot(tl.trans(gated_dy.to(x.dtype)), h.to(x.dtype), input_precision=PRECISION)
        d_ub += tl.sum(d_first, axis=0)
        d_db += tl.sum(gated_dy, axis=0)
        if GATED:
            d_up2 += tl.dot(tl.trans(d_second.to(x.dtype)), x, input_precision=PRECISION)
            d_ub2 += tl.sum(d_second, axis=0)
    width = 2 * F if GATED else F
    base = share.to(tl.int64) * E + expert
    inside = (f < F)[:, None] & (channel < D)[None, :]
    tl.store(dup_ptr + (base * width + f)[:, None] * D + channel[None, :], d_up, mask=inside)
    tl.store(dub_ptr + base * width + f, d_ub, mask=f < F)
    if GATED:
        tl.store(dup_ptr + (base * width + F + f)[:, None] * D + channel[None, :], d_up2, mask=inside)
        tl.store(dub_ptr + base * width + F + f, d_ub2, mask=f < F)
    tl.store(
        ddown_ptr + (base * OUT + out)[:, None] * F + f[None, :], d_down, mask=(out < OUT)[:, None] & (f < F)[None, :]
    )
    if tl.program_id(0) == 0:
        tl.store(ddb_ptr + base * OUT + out, d_db, mask=out < OUT)


def _padded(*widths: int) -> int:
    return max(16, triton.next_power_of_2(max(widths)))


def supports(x: Tensor, down: Tensor, *, backward: bool) -> bool:
    """Whether the fused kernels take these tensors without spilling registers: a float type, and token widths up
    to 128 forward and 64 backward. Wider ones take the blocked torch code."""
    kind = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return kind and _padded(x.shape[1], down.shape[1]) <= (64 if backward else 128)


def blocks(kernel: str, d: int, out: int, element_size: int, *, hopper: bool) -> dict[str, int]:
    """Tile sizes and launch options of `forward`, `token_grad` or `weight_grad`, from shapes and generation alone.

    Found by compiling for sm_80, 90, 100 and 120 and keeping the largest tile that spills nothing
    (tests/kernels/test_kernels_compile.py holds them to it); they are not tuned on a device yet.

    Args:
        kernel: Which one.
        d, out: Token widths in and out.
        element_size: Bytes of a token's element.
        hopper: Whether operands of a GEMM need no registers (sm_90 and sm_100).
    """
    narrow = _padded(d, out) <= 64
    block_m, block_f, warps = 64, 16, 8
    if element_size == 4:
        block_m = 16
    elif hopper and narrow:
        block_f, warps = {"forward": (32, 4), "token_grad": (16, 4), "weight_grad": (16, 8)}[kernel]
    elif not hopper and (kernel == "weight_grad" or not narrow):
        block_m = 32
    return {
        "BLOCK_M": block_m,
        "BLOCK_D": _padded(d),
        "BLOCK_O": _padded(out),
        "BLOCK_F": block_f,
        "num_warps": warps,
        "num_stages": 1,
    }


def _hopper(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def tile_map(counts: Tensor, offsets: Tensor, assignments: int, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert, first row and end row of every tile; a bound known on the host, surplus tiles empty. No sync."""
    experts = counts.numel()
    per_expert = (counts + block_m - 1) // block_m
    ends = per_expert.cumsum(0)
    tiles = torch.arange(triton.cdiv(assignments, block_m) + experts, device=counts.device)
    expert = torch.searchsorted(ends, tiles, right=True)
    surplus = expert >= experts
    expert = expert.clamp(max=experts - 1)
    row = offsets[expert] + (tiles - (ends - per_expert)[expert]) * block_m
    row = torch.where(surplus, offsets[-1], row)
    return expert.int(), row.int(), torch.where(surplus, offsets[-1], offsets[expert + 1]).int()


def _precision(x: Tensor) -> str:
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _tensors(x: Tensor, gates: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    return x.contiguous(), gates.contiguous(), up.contiguous(), down.contiguous()


def _sizes(x: Tensor, ids: Tensor, down: Tensor) -> dict[str, int]:
    return {"K": ids.shape[1], "D": x.shape[1], "F": down.shape[2], "OUT": down.shape[1]}


def mlp_forward(
    x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, gated: bool,
) -> Tensor:  # fmt: skip
    """See `mome_kernels.moe_mlp`."""
    if not supports(x, down, backward=False):
        return cpu_experts.mlp_forward(x, ids, gates, up, up_bias, down, down_bias, activation, gated)
    x, gates, up, down = _tensors(x, gates, up, down)
    counts, offsets, slots, _ = cpu_experts.route(ids, up.shape[0])
    chosen = blocks("forward", x.shape[1], down.shape[1], x.element_size(), hopper=_hopper(x))
    y = torch.empty(ids.numel(), down.shape[1], dtype=torch.float32, device=x.device)
    if ids.numel():
        expert, row, end = tile_map(counts, offsets, ids.numel(), chosen["BLOCK_M"])
        _forward_kernel[(expert.numel(),)](
            x, gates, slots, expert, row, end, up, _or(up_bias, x), down, _or(down_bias, x), y,
            **_sizes(x, ids, down), ACT=ACTIVATION_IDS[activation], GATED=gated, UP_BIAS=up_bias is not None,
            DOWN_BIAS=down_bias is not None, PRECISION=_precision(x), **chosen,
        )  # fmt: skip
    return y.view(*ids.shape, -1).sum(1).to(x.dtype)


def mlp_backward(
    grad: Tensor, x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, gated: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, gates, up, up_bias, down, down_bias; biases that are absent give empty tensors."""
    if not supports(x, down, backward=True):
        return cpu_experts.mlp_backward(grad, x, ids, gates, up, up_bias, down, down_bias, activation, gated)
    x, gates, up, down = _tensors(x, gates, up, down)
    grad = grad.to(x.dtype).contiguous()
    counts, offsets, slots, _ = cpu_experts.route(ids, up.shape[0])
    experts, width, d = up.shape
    out, f = down.shape[1:]
    shared = dict(
        **_sizes(x, ids, down), ACT=ACTIVATION_IDS[activation], GATED=gated, UP_BIAS=up_bias is not None,
        PRECISION=_precision(x),
    )  # fmt: skip
    wide = dict(dtype=torch.float32, device=x.device)
    dx, dgates = torch.zeros(ids.numel(), d, **wide), torch.zeros(ids.numel(), **wide)
    if ids.numel():
        chosen = blocks("token_grad", d, out, x.element_size(), hopper=_hopper(x))
        expert, row, end = tile_map(counts, offsets, ids.numel(), chosen["BLOCK_M"])
        _token_grad_kernel[(expert.numel(),)](
            grad, x, gates, slots, expert, row, end, up, _or(up_bias, x), down, _or(down_bias, x), dx, dgates,
            DOWN_BIAS=down_bias is not None, **shared, **chosen,
        )  # fmt: skip
    chosen = blocks("weight_grad", d, out, x.element_size(), hopper=_hopper(x))
    hidden_blocks = triton.cdiv(f, chosen["BLOCK_F"])
    split = shares(ids.numel(), experts, hidden_blocks, chosen["BLOCK_M"])
    d_up, d_ub = torch.empty(split, experts, width, d, **wide), torch.empty(split, experts, width, **wide)
    d_down, d_db = torch.empty(split, experts, out, f, **wide), torch.empty(split, experts, out, **wide)
    _weight_grad_kernel[(hidden_blocks, split, experts)](
        grad, x, gates, slots, offsets, up, _or(up_bias, x), down, d_up, d_ub, d_down, d_db, E=experts, SPLIT=split,
        **shared, **chosen,
    )  # fmt: skip
    return (
        dx.view(*ids.shape, d).sum(1).to(x.dtype),
        dgates.view(ids.shape).to(gates.dtype),
        d_up.sum(0).to(up.dtype),
        x.new_zeros(0) if up_bias is None else d_ub.sum(0).to(up_bias.dtype),
        d_down.sum(0).to(down.dtype),
        x.new_zeros(0) if down_bias is None else d_db.sum(0).to(down_bias.dtype),
    )


def shares(assignments: int, experts: int, hidden_blocks: int, block_m: int) -> int:
    """Shares of an expert's assignments: about 512 programs in all, from shapes alone, so that reruns agree."""
    wanted = max(1, 512 // max(1, experts * hidden_blocks))
    return max(1, min(wanted, triton.cdiv(assignments, 4 * block_m * max(1, experts))))


def _or(bias: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer that is never read where there is no bias."""
    return stand_in if bias is None else bias.contiguous()


linear_forward = cpu_experts.linear_forward
linear_backward = cpu_experts.linear_backward
