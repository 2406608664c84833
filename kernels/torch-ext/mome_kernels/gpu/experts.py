"""Expert layers on a GPU: the same functions as `cpu_experts`, out of the kernels of this folder.

Token widths with a row in the tables for `mlp` run fused; wider ones, and all where `keep_hidden` asks for z, run as
grouped GEMMs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import configs, fused, fused_backward, grouped, grouped_gradient, routing, rows
from .launch import Machine, ceil_div, interpreting, machine_of

FORWARD, BACKWARD = ("mlp",), ("mlp_dx", "mlp_dw")


def runs_fused(x: Tensor, down: Tensor, gated: bool, kernels: tuple[str, ...] = FORWARD) -> bool:
    """Whether these fused kernels have a configuration for the shapes."""
    d, f = down.shape[1:]
    machine = machine_of(x)
    return d == x.shape[1] and all(
        configs.fused(machine, kernel, d, f, x.element_size(), gated) is not None for kernel in kernels
    )


def through_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's interpreter computes bfloat16 wrongly and says nothing: it gets float32, rounded afterwards."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        first = arguments[0]
        if not (interpreting() and first.dtype == torch.bfloat16):
            return function(*arguments, **options)
        dtypes = [a.dtype for a in arguments if torch.is_tensor(a)]
        wide = [a.float() if torch.is_tensor(a) and a.dtype == torch.bfloat16 else a for a in arguments]
        result = function(*wide, **options)
        narrow = lambda t: t.to(torch.bfloat16) if torch.bfloat16 in dtypes and t.dtype == torch.float32 else t  # noqa: E731
        return tuple(map(narrow, result)) if isinstance(result, tuple) else narrow(result)

    return wrapped


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Copies of those that are not contiguous yet."""
    return [None if t is None else t.contiguous() for t in tensors]


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(*shape, dtype=dtype or like.dtype, device=like.device)


def grouped_linear(
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
    """(rows, N) in expert order; see `grouped.plan_linear`."""
    epilogue = activation != "none" or gated or z_out is not None
    height = grouped.rows_per_tile(machine, weight, a.element_size(), transpose, gated, epilogue)
    tiles = routing.tiles(offsets, assignments, height)
    columns = weight.shape[2] if transpose else weight.shape[1] // (2 if gated else 1)
    out = _empty(a, assignments, columns) if out is None else out
    grouped.plan_linear(
        a,
        weight,
        bias,
        tiles,
        offsets,
        out,
        machine,
        transpose=transpose,
        gated=gated,
        activation=activation,
        z_out=z_out,
        **options,
    ).run()
    return out


# -- feed-forward experts -----------------------------------------------------------------------------------------


@through_float32
def mlp_forward(
    x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, gated: bool, keep_hidden: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `mome_kernels.moe_mlp`; also z in expert order where it was kept, else an empty tensor."""
    x, gates, up, up_bias, down, down_bias = contiguous(x, gates, up, up_bias, down, down_bias)
    machine, n, share = machine_of(x), ids.numel(), ids.shape[1]
    out = _empty(x, x.shape[0], down.shape[1])
    hidden = _empty(x, 0)
    if n == 0:
        return out.zero_(), _empty(x, 0, up.shape[1]) if keep_hidden else hidden
    way = routing.route(ids, up.shape[0])
    if runs_fused(x, down, gated) and not keep_hidden:
        config = configs.fused(machine, "mlp", *down.shape[1:], x.element_size(), gated)
        tiles = routing.tiles(way.offsets, n, fused.rows_per_program(machine, config, n))
        y = out if share == 1 else _empty(x, n, down.shape[1])
        fused.plan_forward(
            x, up, up_bias, down, down_bias, gates, way.permutation, way.offsets, tiles, y, machine,
            share=share, activation=activation, gated=gated, scatter=share == 1,
        ).run()  # fmt: skip
    else:
        if keep_hidden:
            hidden = _empty(x, n, up.shape[1])
        h = grouped_linear(
            x, up, up_bias, way.offsets, n, machine, slots=way.permutation, share=share, gather=True,
            activation=activation, gated=gated, z_out=hidden if keep_hidden else None,
        )  # fmt: skip
        y = grouped_linear(
            h, down, down_bias, way.offsets, n, machine, slots=way.permutation, share=1, scatter=share == 1,
            gates=gates if share == 1 else None, out=out if share == 1 else None,
        )  # fmt: skip
    if share > 1:
        rows.plan_combine(y, gates, way.inverse, share, out).run()
    return out, hidden


def _fused_backward(
    grad: Tensor, x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, gated: bool, way: routing.Routing, machine: Machine,
) -> tuple[Tensor, ...]:  # fmt: skip
    n, share, (_, d, f), width = ids.numel(), ids.shape[1], down.shape, up.shape[1]
    common = {"share": share, "activation": activation, "gated": gated}
    config = configs.fused(machine, "mlp_dx", d, f, x.element_size(), gated)
    tiles = routing.tiles(way.offsets, n, fused.rows_per_program(machine, config, n))
    dx, d_gates = _empty(x, n, d), torch.empty_like(gates)
    fused_backward.plan_dx(
        grad, x, up, up_bias, down, down_bias, gates, way.permutation, way.offsets, tiles, dx, d_gates, machine,
        scatter=share == 1, **common,
    ).run()  # fmt: skip
    if share > 1:
        dx = rows.combine(dx, None, way.inverse, x.shape[0], share)

    config = configs.fused(machine, "mlp_dw", d, f, x.element_size(), gated)
    programs = ceil_div(f, config["BF"])
    height = grouped_gradient.rows_per_share(machine, n, programs) or n
    tiles = routing.tiles(way.offsets, n, height)
    sizes = [width * d, d * f, 0 if up_bias is None else width]
    parts = _empty(x, tiles.bound, sum(sizes), dtype=torch.float32)
    fused_backward.plan_dw(
        grad, x, up, up_bias, down, gates, way.permutation, way.offsets, tiles, parts, machine, **common
    ).run()
    sums = [torch.empty_like(t) if t is not None else _empty(x, 0) for t in (up, down, up_bias, down_bias)]
    start = 0
    for size, out in zip(sizes, sums, strict=False):
        if size:
            grouped_gradient.plan_sum(parts.view(-1)[start:], tiles, out, parts.shape[1]).run()
        start += size
    if down_bias is not None:
        tiles = routing.tiles(way.offsets, n, grouped_gradient.rows_per_share(machine, n, ceil_div(d, 64)) or n)
        parts = _empty(x, tiles.bound, d, dtype=torch.float32)
        grouped_gradient.plan_gated_rows(grad, gates, way.permutation, tiles, way.offsets, parts, share).run()
        grouped_gradient.plan_sum(parts, tiles, sums[3], d).run()
    d_up, d_down, d_up_bias, d_down_bias = sums
    return dx, d_gates, d_up, d_up_bias, d_down, d_down_bias


def _grouped_backward(
    grad: Tensor, x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, gated: bool, hidden: Tensor, way: routing.Routing, machine: Machine,
) -> tuple[Tensor, ...]:  # fmt: skip
    n, share = ids.numel(), ids.shape[1]
    slots = {"slots": way.permutation, "share": share}
    if hidden.numel() == 0:
        hidden = grouped_linear(x, up, up_bias, way.offsets, n, machine, gather=True, **slots)
    # ⟨dy, W₂ h⟩ = ⟨W₂ᵀ dy, h⟩: the experts' outputs are not needed again
    dh = grouped_linear(grad, down, None, way.offsets, n, machine, transpose=True, gather=True, **slots)
    h, dz, d_gates = torch.empty_like(dh), torch.empty_like(hidden), torch.empty_like(gates)
    rows.plan_activation_backward(
        dh, hidden, h, dz, grad, down_bias, ids, way.permutation, gates, d_gates, activation, gated
    ).run()
    del dh
    dx = grouped_linear(dz, up, None, way.offsets, n, machine, transpose=True)
    dx = rows.combine(dx, None, way.inverse, x.shape[0], share)
    d_down, d_down_bias = grouped_gradient.weight_gradient(
        grad, h, way.offsets, n, down, down_bias, machine, gates=gates, gather_y=True, **slots
    )
    d_up, d_up_bias = grouped_gradient.weight_gradient(
        dz, x, way.offsets, n, up, up_bias, machine, gather_x=True, **slots
    )
    none = _empty(x, 0)
    return dx, d_gates, d_up, none if d_up_bias is None else d_up_bias, d_down, (
        none.clone() if d_down_bias is None else d_down_bias
    )  # fmt: skip


@through_float32
def mlp_backward(
    grad: Tensor, x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, gated: bool, hidden: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, gates, up, up_bias, down, down_bias; biases that are absent give empty tensors."""
    grad, x, ids, gates, up, up_bias, down, down_bias = contiguous(
        grad.to(x.dtype), x, ids, gates, up, up_bias, down, down_bias
    )
    if ids.numel() == 0:
        zeros = [torch.zeros_like(t) if t is not None else _empty(x, 0) for t in (x, gates, up, up_bias, down)]
        return *zeros, torch.zeros_like(down_bias) if down_bias is not None else _empty(x, 0)
    way, machine = routing.route(ids, up.shape[0]), machine_of(x)
    shared = (grad, x, ids, gates, up, up_bias, down, down_bias, activation, gated)
    if runs_fused(x, down, gated, BACKWARD):
        return _fused_backward(*shared, way, machine)
    return _grouped_backward(*shared, hidden, way, machine)


# -- linear experts -------------------------------------------------------------------------------------------------


@through_float32
def linear_forward(x: Tensor, ids: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `mome_kernels.moe_linear`."""
    x, gates, weight, bias = contiguous(x, gates, weight, bias)
    machine, n, share = machine_of(x), ids.numel(), ids.shape[1]
    out = _empty(x, x.shape[0], weight.shape[1])
    if n == 0:
        return out.zero_()
    way = routing.route(ids, weight.shape[0])
    options = {"slots": way.permutation, "share": share, "gather": True}
    if share == 1:
        grouped_linear(x, weight, bias, way.offsets, n, machine, gates=gates, scatter=True, out=out, **options)
        return out
    y = grouped_linear(x, weight, bias, way.offsets, n, machine, **options)
    rows.plan_combine(y, gates, way.inverse, share, out).run()
    return out


@through_float32
def linear_backward(
    grad: Tensor, x: Tensor, ids: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of x, gates, weight, bias."""
    grad, x, ids, gates, weight, bias = contiguous(grad.to(x.dtype), x, ids, gates, weight, bias)
    n, share = ids.numel(), ids.shape[1]
    if n == 0:
        zeros = [torch.zeros_like(t) for t in (x, gates, weight)]
        return *zeros, _empty(x, 0) if bias is None else torch.zeros_like(bias)
    machine, way = machine_of(x), routing.route(ids, weight.shape[0])
    slots = {"slots": way.permutation, "share": share}
    back = grouped_linear(grad, weight, None, way.offsets, n, machine, transpose=True, gather=True, **slots)
    d_gates = torch.empty_like(gates)
    rows.plan_row_dot(back, x, grad, bias, ids, way.permutation, d_gates).run()
    dx = _empty(x, *x.shape)
    rows.plan_combine(back, gates, way.inverse, share, dx).run()
    d_weight, d_bias = grouped_gradient.weight_gradient(
        grad, x, way.offsets, n, weight, bias, machine, gates=gates, gather_y=True, gather_x=True, **slots
    )
    return dx, d_gates, d_weight, _empty(x, 0) if d_bias is None else d_bias
