"""Expert layers on a GPU: the functions of `torch_impl.experts`, composed of the kernels of this folder.

Token widths with a row for `mlp` in the tables run fused. Wider ones, and all of them where `keep_hidden` asks for z,
run as grouped matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..order import AssignmentOrder
from ..weights import ExpertWeights
from . import configs, fused, fused_backward, grouped_gradient, routing, rows
from .grouped_linear import run_linear
from .interpreter import through_float32
from .launch import Machine, ceil_div, contiguous, empty, machine_of

FORWARD, BACKWARD = ("mlp",), ("mlp_dx", "mlp_dw")


def runs_fused(x: Tensor, experts: ExpertWeights, kernels: tuple[str, ...] = FORWARD) -> bool:
    """Whether these fused kernels have a configuration for the shapes."""
    d, f = experts.out_width, experts.hidden_width
    machine = machine_of(x)
    return d == x.shape[1] and all(
        configs.fused(machine, kernel, d, f, x.element_size(), experts.gated) is not None for kernel in kernels
    )


def _contiguous(experts: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(*contiguous(*experts[:4]), experts.activation, experts.gated)


def _order(ids_TK: Tensor, experts: ExpertWeights) -> AssignmentOrder:
    order = routing.route(ids_TK, experts.num_experts)
    return AssignmentOrder(order.permutation, order.inverse, order.offsets)


def _zeros(like: Tensor | None, x: Tensor) -> Tensor:
    """Zeros of the same shape, or an empty tensor where there is no parameter."""
    return empty(x, 0) if like is None else torch.zeros_like(like)


# -- feed-forward experts -----------------------------------------------------------------------------------------


@through_float32
def mlp_forward(
    x: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights, keep_hidden: bool = False
) -> tuple[Tensor, ...]:
    """See `mome_kernels.moe_mlp`.

    Also returns z in expert order with `keep_hidden`, else an empty tensor, and the fields of an `AssignmentOrder`.
    """
    x, weights_TK = contiguous(x, weights_TK)
    experts = _contiguous(experts)
    machine, n, per_token = machine_of(x), ids_TK.numel(), ids_TK.shape[1]
    out = empty(x, x.shape[0], experts.out_width)
    hidden = empty(x, 0)
    if n == 0:
        permutation, inverse, offsets = (empty(x, m, dtype=torch.int32) for m in (0, 0, experts.num_experts + 1))
        hidden = empty(x, 0, experts.up_width) if keep_hidden else hidden
        return out.zero_(), hidden, permutation, inverse, offsets.zero_()
    order = _order(ids_TK, experts)
    single = per_token == 1  # then every row of the output is one row, weighted and stored by the last kernel
    if runs_fused(x, experts) and not keep_hidden:
        config = fused.config_of("mlp", x, experts, machine)
        tiles = routing.tiles(order.offsets, n, fused.rows_per_program(machine, config, n))
        y = out if single else empty(x, n, experts.out_width)
        fused.plan_forward(
            x, experts, weights_TK, order.permutation, order.offsets, tiles, y, machine, scatter=single
        ).run()
    else:
        if keep_hidden:
            hidden = empty(x, n, experts.up_width)
        h = run_linear(
            x, experts.up, experts.up_bias, order.offsets, n, machine, slots=order.permutation, per_token=per_token,
            gather=True, activation=experts.activation, gated=experts.gated, z_out=hidden if keep_hidden else None,
        )  # fmt: skip
        y = run_linear(
            h, experts.down, experts.down_bias, order.offsets, n, machine, slots=order.permutation, per_token=1,
            scatter=single, weights_TK=weights_TK if single else None, out=out if single else None,
        )  # fmt: skip
    if not single:
        rows.plan_combine(y, weights_TK, order.inverse, per_token, out).run()
    return out, hidden, *order


def _fused_backward(
    grad: Tensor, x: Tensor, weights_TK: Tensor, experts: ExpertWeights, order: AssignmentOrder, machine: Machine,
) -> tuple[Tensor, ...]:  # fmt: skip
    up, up_bias, down, down_bias, *_ = experts
    n, per_token, d, f = weights_TK.numel(), weights_TK.shape[1], experts.out_width, experts.hidden_width
    config = fused.config_of("mlp_dx", x, experts, machine)
    tiles = routing.tiles(order.offsets, n, fused.rows_per_program(machine, config, n))
    dx, d_weights_TK = empty(x, n, d), torch.empty_like(weights_TK)
    fused_backward.plan_dx(
        grad, x, experts, weights_TK, order.permutation, order.offsets, tiles, dx, d_weights_TK, machine,
        scatter=per_token == 1,
    ).run()  # fmt: skip
    if per_token > 1:
        dx = rows.combine(dx, None, order.inverse, x.shape[0], per_token)

    config = fused.config_of("mlp_dw", x, experts, machine)
    programs = ceil_div(f, config["BF"])
    height = grouped_gradient.rows_per_split(machine, n, programs) or n
    tiles = routing.tiles(order.offsets, n, height)
    sizes = [experts.up_width * d, d * f, 0 if up_bias is None else experts.up_width]
    parts = empty(x, tiles.bound, sum(sizes), dtype=torch.float32)
    fused_backward.plan_dw(
        grad, x, experts, weights_TK, order.permutation, order.offsets, tiles, parts, machine
    ).run()  # fmt: skip
    sums = [torch.empty_like(t) if t is not None else empty(x, 0) for t in (up, down, up_bias, down_bias)]
    start = 0
    for size, out in zip(sizes, sums, strict=False):
        if size:
            grouped_gradient.plan_sum(parts.view(-1)[start:], tiles, out, parts.shape[1]).run()
        start += size
    if down_bias is not None:
        height = grouped_gradient.rows_per_split(machine, n, ceil_div(d, 64)) or n
        tiles = routing.tiles(order.offsets, n, height)
        parts = empty(x, tiles.bound, d, dtype=torch.float32)
        grouped_gradient.plan_weighted_row_sums(
            grad, weights_TK, order.permutation, tiles, order.offsets, parts
        ).run()  # fmt: skip
        grouped_gradient.plan_sum(parts, tiles, sums[3], d).run()
    d_up, d_down, d_up_bias, d_down_bias = sums
    return dx, d_weights_TK, d_up, d_up_bias, d_down, d_down_bias


def _grouped_backward(
    grad: Tensor, x: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights, hidden: Tensor,
    order: AssignmentOrder, machine: Machine,
) -> tuple[Tensor, ...]:  # fmt: skip
    up, up_bias, down, down_bias, activation, gated = experts
    n, per_token = ids_TK.numel(), ids_TK.shape[1]
    slots = {"slots": order.permutation, "per_token": per_token}
    if hidden.numel() == 0:
        hidden = run_linear(x, up, up_bias, order.offsets, n, machine, gather=True, **slots)
    # ⟨dy, W₂ h⟩ = ⟨W₂ᵀ dy, h⟩, so that the experts' outputs are not computed again
    dh = run_linear(grad, down, None, order.offsets, n, machine, transpose=True, gather=True, **slots)
    h, dz, d_weights_TK = torch.empty_like(dh), torch.empty_like(hidden), torch.empty_like(weights_TK)
    rows.plan_activation_backward(
        dh, hidden, h, dz, grad, down_bias, ids_TK, order.permutation, weights_TK, d_weights_TK, activation, gated
    ).run()
    del dh
    dx = run_linear(dz, up, None, order.offsets, n, machine, transpose=True)
    dx = rows.combine(dx, None, order.inverse, x.shape[0], per_token)
    d_down, d_down_bias = grouped_gradient.weight_gradient(
        grad, h, order.offsets, n, down, down_bias, machine, weights_TK=weights_TK, gather_y=True, **slots
    )
    d_up, d_up_bias = grouped_gradient.weight_gradient(
        dz, x, order.offsets, n, up, up_bias, machine, gather_x=True, **slots
    )
    return (
        dx, d_weights_TK, d_up, empty(x, 0) if d_up_bias is None else d_up_bias, d_down,
        empty(x, 0) if d_down_bias is None else d_down_bias,
    )  # fmt: skip


@through_float32
def mlp_backward(
    grad: Tensor, x: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights, hidden: Tensor,
    *order: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, weights, up, up_bias, down, down_bias; that of an absent bias is an empty tensor.

    `hidden` and `order` are what the forward pass returned behind its result.
    """
    grad, x, ids_TK, weights_TK = contiguous(grad.to(x.dtype), x, ids_TK, weights_TK)
    experts = _contiguous(experts)
    if ids_TK.numel() == 0:
        return tuple(_zeros(t, x) for t in (x, weights_TK, *experts[:4]))
    machine = machine_of(x)
    if runs_fused(x, experts, BACKWARD):
        return _fused_backward(grad, x, weights_TK, experts, AssignmentOrder(*order), machine)
    return _grouped_backward(grad, x, ids_TK, weights_TK, experts, hidden, AssignmentOrder(*order), machine)


# -- linear experts -------------------------------------------------------------------------------------------------


@through_float32
def linear_forward(x: Tensor, ids_TK: Tensor, weights_TK: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `mome_kernels.moe_linear`."""
    x, weights_TK, weight, bias = contiguous(x, weights_TK, weight, bias)
    machine, n, per_token = machine_of(x), ids_TK.numel(), ids_TK.shape[1]
    out = empty(x, x.shape[0], weight.shape[1])
    if n == 0:
        return out.zero_()
    order = routing.route(ids_TK, weight.shape[0])
    options = {"slots": order.permutation, "per_token": per_token, "gather": True}
    if per_token == 1:
        options |= {"weights_TK": weights_TK, "scatter": True, "out": out}
        run_linear(x, weight, bias, order.offsets, n, machine, **options)
        return out
    y = run_linear(x, weight, bias, order.offsets, n, machine, **options)
    rows.plan_combine(y, weights_TK, order.inverse, per_token, out).run()
    return out


@through_float32
def linear_backward(
    grad: Tensor, x: Tensor, ids_TK: Tensor, weights_TK: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of x, weights, weight, bias; that of an absent bias is an empty tensor."""
    grad, x, ids_TK, weights_TK, weight, bias = contiguous(grad.to(x.dtype), x, ids_TK, weights_TK, weight, bias)
    n, per_token = ids_TK.numel(), ids_TK.shape[1]
    if n == 0:
        return tuple(_zeros(t, x) for t in (x, weights_TK, weight, bias))
    machine, order = machine_of(x), routing.route(ids_TK, weight.shape[0])
    slots = {"slots": order.permutation, "per_token": per_token}
    back = run_linear(grad, weight, None, order.offsets, n, machine, transpose=True, gather=True, **slots)
    d_weights_TK = torch.empty_like(weights_TK)
    rows.plan_row_dot(back, x, grad, bias, ids_TK, order.permutation, d_weights_TK).run()
    dx = empty(x, *x.shape)
    rows.plan_combine(back, weights_TK, order.inverse, per_token, dx).run()
    d_weight, d_bias = grouped_gradient.weight_gradient(
        grad, x, order.offsets, n, weight, bias, machine, weights_TK=weights_TK, gather_y=True, gather_x=True, **slots
    )
    return dx, d_weights_TK, d_weight, empty(x, 0) if d_bias is None else d_bias
