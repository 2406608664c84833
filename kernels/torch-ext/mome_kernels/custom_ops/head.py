"""The fusion head as a torch op."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import dispatch
from ..weights import HeadWeights
from .registration import differentiable, fake, operator

# The fields of `HeadWeights` as a schema has them.
_HEAD = (
    "Tensor query, Tensor scale_bias, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, Tensor b3, "
    "SymInt top_k, float negative_slope"
)


@operator(
    "fusion_head",
    f"(Tensor features, {_HEAD}) -> Tensor",
)
def fusion_head(features: Tensor, *head: Any) -> Tensor:
    """Logits (B, P, V)."""
    weights = HeadWeights(*head)
    with dispatch.op_context(features):
        return dispatch.head(features, weights).forward(features, weights)


@fake(fusion_head)
def _(features: Tensor, *head: Any) -> Tensor:
    return features.new_empty(features.shape[0], HeadWeights(*head).prompts, features.shape[3])


@operator(
    "fusion_head_backward",
    f"(Tensor grad, Tensor features, {_HEAD})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def fusion_head_backward(grad: Tensor, features: Tensor, *head: Any) -> tuple[Tensor, ...]:
    """Gradients of the features and of the eight tensors of the head."""
    weights = HeadWeights(*head)
    with dispatch.op_context(features):
        return dispatch.head(features, weights).backward(grad, features, weights)


@fake(fusion_head_backward)
def _(grad: Tensor, features: Tensor, *head: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (features, *HeadWeights(*head).tensors))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.top_k, ctx.negative_slope = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *fusion_head_backward(grad.contiguous(), *ctx.saved_tensors, ctx.top_k, ctx.negative_slope), None, None


differentiable(fusion_head, _gradients, _setup)
differentiable(fusion_head_backward)
