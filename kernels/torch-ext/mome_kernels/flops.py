"""Floating-point operations of every op, for `torch.utils.flop_counter`: a multiplication and an addition are two.

Recomputed products of a backward pass are counted: they are done.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ._ops import NAMESPACE


def _mlp(x, ids, gates, up, up_bias, down, *_: Any, **__: Any) -> int:
    return 2 * prod(ids) * (up[1] * up[2] + down[1] * down[2])


def _mlp_backward(grad, *shapes: Any, **_: Any) -> int:
    x, ids, gates, up, up_bias, down, *_rest = shapes
    return 2 * prod(ids) * (3 * up[1] * up[2] + 2 * down[1] * down[2])


def _linear(x, ids, gates, weight, *_: Any, **__: Any) -> int:
    return 2 * prod(ids) * weight[1] * weight[2]


def _linear_backward(grad, x, ids, gates, weight, *_: Any, **__: Any) -> int:
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


def _head_of(features, query) -> int:
    batch, scales, channels, voxels = features
    fusion = 4 * scales * channels if scales > 1 else 0
    return batch * query[0] * voxels * (fusion + 4 * channels**2 + 2 * channels)


def _head(features, query, *_: Any, **__: Any) -> int:
    return _head_of(features, query)


def _head_backward(grad, features, query, *_: Any, **__: Any) -> int:
    return 3 * _head_of(features, query)


_FORMULAS = {
    "moe_mlp": _mlp,
    "moe_mlp_backward": _mlp_backward,
    "moe_linear": _linear,
    "moe_linear_backward": _linear_backward,
    "grouped_linear": _grouped,
    "grouped_linear_dx": _grouped_dx,
    "grouped_linear_dw": _grouped_dw,
    "combine": _combine,
    "combine_backward": _combine_backward,
    "fusion_head": _head,
    "fusion_head_backward": _head_backward,
}


def register() -> None:
    """Tells `torch.utils.flop_counter` of the ops of this package."""
    namespace = getattr(torch.ops, NAMESPACE)
    for name, formula in _FORMULAS.items():
        register_flop_formula(getattr(namespace, name))(formula)
