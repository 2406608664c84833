"""The torch ops of this package: functional, differentiable, with a CPU implementation of the same semantics.

Forward and backward are separate ops, so that compile, export and activation checkpointing see each of them as
one node. Gradients are registered per op; nothing is mutated; results are contiguous whatever the layout of the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch
from ._ops import add_op_namespace_prefix

# -- routing ------------------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("route"), mutates_args=())
def _route(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with dispatch.settled(expert_ids):
        return dispatch.router(expert_ids).route(expert_ids, num_experts)


@_route.register_fake
def _(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = expert_ids.numel()
    return (
        expert_ids.new_empty(num_experts, dtype=torch.int32),
        expert_ids.new_empty(num_experts + 1, dtype=torch.int32),
        expert_ids.new_empty(n, dtype=torch.int64),
        expert_ids.new_empty(n, dtype=torch.int64),
    )


# -- feed-forward experts ---------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("moe_mlp"), mutates_args=())
def _moe_mlp(
    x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, gated: bool, keep_hidden: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with dispatch.settled(x):
        return dispatch.experts(x).mlp_forward(
            x, ids, gates, up, up_bias, down, down_bias, activation, gated, keep_hidden
        )


@_moe_mlp.register_fake
def _(
    x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, gated: bool, keep_hidden: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    hidden = x.new_empty(ids.numel(), up.shape[1]) if keep_hidden else x.new_empty(0)
    return x.new_empty(x.shape[0], down.shape[1]), hidden


@torch.library.custom_op(add_op_namespace_prefix("moe_mlp_backward"), mutates_args=())
def _moe_mlp_backward(
    grad: Tensor, x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, gated: bool, hidden: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with dispatch.settled(x):
        return dispatch.experts(x).mlp_backward(
            grad, x, ids, gates, up, up_bias, down, down_bias, activation, gated, hidden
        )


@_moe_mlp_backward.register_fake
def _(
    grad: Tensor, x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, activation: str, gated: bool, hidden: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape),
        gates.new_empty(gates.shape),
        up.new_empty(up.shape),
        x.new_empty(0) if up_bias is None else up_bias.new_empty(up_bias.shape),
        down.new_empty(down.shape),
        x.new_empty(0) if down_bias is None else down_bias.new_empty(down_bias.shape),
    )


def _mlp_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.gated, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # nothing flows back into the kept hidden layer


def _mlp_grad(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, ids, gates, up, up_bias, down, down_bias, hidden = ctx.saved_tensors
    if grad is None:
        return (None,) * 10
    d_x, d_gates, d_up, d_up_bias, d_down, d_down_bias = _moe_mlp_backward(
        grad.contiguous(), x, ids, gates, up, up_bias, down, down_bias, ctx.activation, ctx.gated, hidden
    )
    return (
        d_x, None, d_gates, d_up, None if up_bias is None else d_up_bias, d_down,
        None if down_bias is None else d_down_bias, None, None, None,
    )  # fmt: skip


_moe_mlp.register_autograd(_mlp_grad, setup_context=_mlp_setup)


# -- linear experts ---------------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("moe_linear"), mutates_args=())
def _moe_linear(x: Tensor, ids: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with dispatch.settled(x):
        return dispatch.experts(x).linear_forward(x, ids, gates, weight, bias)


@_moe_linear.register_fake
def _(x: Tensor, ids: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op(add_op_namespace_prefix("moe_linear_backward"), mutates_args=())
def _moe_linear_backward(
    grad: Tensor, x: Tensor, ids: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with dispatch.settled(x):
        return dispatch.experts(x).linear_backward(grad, x, ids, gates, weight, bias)


@_moe_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, ids: Tensor, gates: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_bias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), gates.new_empty(gates.shape), weight.new_empty(weight.shape), d_bias


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, ids, gates, weight, bias = ctx.saved_tensors
    d_x, d_gates, d_weight, d_bias = _moe_linear_backward(grad.contiguous(), x, ids, gates, weight, bias)
    return d_x, None, d_gates, d_weight, None if bias is None else d_bias


_moe_linear.register_autograd(_linear_grad, setup_context=_linear_setup)


# -- fusion head --------------------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("fusion_head"), mutates_args=())
def _fusion_head(
    features: Tensor, query: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor,
    b3: Tensor, top_k: int, negative_slope: float,
) -> Tensor:  # fmt: skip
    with dispatch.settled(features):
        return dispatch.head(features).forward(features, query, bias, w1, b1, w2, b2, w3, b3, top_k, negative_slope)


@_fusion_head.register_fake
def _(
    features: Tensor, query: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor,
    b3: Tensor, top_k: int, negative_slope: float,
) -> Tensor:  # fmt: skip
    return features.new_empty(features.shape[0], query.shape[0], features.shape[3])


@torch.library.custom_op(add_op_namespace_prefix("fusion_head_backward"), mutates_args=())
def _fusion_head_backward(
    grad: Tensor, features: Tensor, query: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    w3: Tensor, b3: Tensor, top_k: int, negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with dispatch.settled(features):
        return dispatch.head(features).backward(
            grad, features, query, bias, w1, b1, w2, b2, w3, b3, top_k, negative_slope
        )


@_fusion_head_backward.register_fake
def _(
    grad: Tensor, features: Tensor, query: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    w3: Tensor, b3: Tensor, top_k: int, negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (features, query, bias, w1, b1, w2, b2, w3, b3)
    return tuple(t.new_empty(t.shape) for t in inputs)


def _head_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.top_k, ctx.negative_slope = inputs
    ctx.save_for_backward(*tensors)


def _head_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_fusion_head_backward(grad.contiguous(), *ctx.saved_tensors, ctx.top_k, ctx.negative_slope), None, None


_fusion_head.register_autograd(_head_grad, setup_context=_head_setup)
