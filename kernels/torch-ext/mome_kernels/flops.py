"""Floating-point operations of every op, for `torch.utils.flop_counter`.

A multiplication and an addition count as two operations. Products that a backward pass computes again are counted.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ._ops import add_op_namespace_prefix


def _mlp(x, ids, weights, up, up_bias, down, *_: Any, **__: Any) -> int:
    return 2 * prod(ids) * (up[1] * up[2] + down[1] * down[2])


def _mlp_backward(grad, *shapes: Any, **_: Any) -> int:
    """Where z was not kept this is the count of the fused kernels: z twice and ∂h twice, once for ∂x and once for ∂W.

    Without them (see "Fused widths" in the README) z and ∂h are computed once each; shapes do not show which it is.
    """
    x, ids, weights, up, up_bias, down, *_rest, hidden, _permutation, _inverse, _offsets = shapes
    ups, downs = (2, 2) if prod(hidden) else (4, 3)
    return 2 * prod(ids) * (ups * up[1] * up[2] + downs * down[1] * down[2])


def _linear(x, ids, weights, weight, *_: Any, **__: Any) -> int:
    return 2 * prod(ids) * weight[1] * weight[2]


def _linear_backward(grad, x, ids, weights, weight, *_: Any, **__: Any) -> int:
    return 4 * prod(ids) * weight[1] * weight[2]


def _grouped(x, weight, offsets, bias, index, *_: Any, **__: Any) -> int:
    return 2 * (x[0] if index is None else index[0]) * weight[1] * weight[2]


def _grouped_dx(grad, weight, *_: Any, **__: Any) -> int:
    return 2 * grad[0] * weight[1] * weight[2]


def _grouped_dw(grad, x, *_: Any, **__: Any) -> int:
    return 2 * grad[0] * grad[1] * x[1]


def _combine(y, *_: Any, **__: Any) -> int:
    return 2 * prod(y)


def _combine_backward(grad, y, *_: Any, **__: Any) -> int:
    return 3 * prod(y)


def _scatter_rows(grad, *_: Any, **__: Any) -> int:
    return prod(grad)


def _head_forward_flops(features, query) -> int:
    batch, scales, channels, voxels = features
    fusion = 4 * scales * channels if scales > 1 else 0
    return batch * query[0] * voxels * (fusion + 4 * channels**2 + 2 * channels)


def _head(features, query, *_: Any, **__: Any) -> int:
    return _head_forward_flops(features, query)


def _head_backward(grad, features, query, *_: Any, **__: Any) -> int:
    return 3 * _head_forward_flops(features, query)


_FORMULAS = {
    "moe_mlp": _mlp,
    "moe_mlp_backward": _mlp_backward,
    "moe_linear": _linear,
    "moe_linear_backward": _linear_backward,
    "grouped_linear": _grouped,
    "grouped_linear_dx": _grouped_dx,
    "grouped_linear_dw": _grouped_dw,
    "combine": _combine,
    "scatter_rows": _scatter_rows,
    "combine_backward": _combine_backward,
    "fusion_head": _head,
    "fusion_head_backward": _head_backward,
}


def register() -> None:
    """Registers the ops of this package with `torch.utils.flop_counter`."""
    for name, formula in _FORMULAS.items():
        namespace, _, op = add_op_namespace_prefix(name).partition("::")
        register_flop_formula(getattr(getattr(torch.ops, namespace), op))(formula)
