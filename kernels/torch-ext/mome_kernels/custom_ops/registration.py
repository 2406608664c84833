"""Registers torch ops with their gradients, with less Python around a call than `torch.library.custom_op` has.

A call of a small layer is dominated by the time that Python takes. `custom_op` adds checks of every call, and
`register_autograd` a wrapper around every forward and backward pass: together about twice the time of what is done here
(torch 2.11 and 2.14). The ops are the same for `torch.compile`, `torch.export` and `opcheck`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._ops import add_op_namespace_prefix

Setup = Callable[[Any, tuple[Any, ...], Any], None]
Gradients = Callable[..., tuple[Any, ...]]
_LIBRARY = torch.library.Library(add_op_namespace_prefix("").partition("::")[0], "FRAGMENT")


def operator(name: str, schema: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Decorates the implementation of an op on all devices; the name then stands for the op.

    Args:
        name: The name without the namespace.
        schema: Arguments without default values, and results; None takes them from the annotations.
    """

    def register(function: Callable[..., Any]) -> Any:
        signature = schema or torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        packet = getattr(getattr(torch.ops, _LIBRARY.ns), name)
        return packet.default

    return register


def fake(op: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the function that gives an op's results without values, for tracing."""
    return torch.library.register_fake(op.name(), lib=_LIBRARY)


def _refused(op: Any) -> Gradients:
    def gradients(ctx: Any, *_: Any) -> tuple[Any, ...]:
        raise RuntimeError(f"{op.name()} has no derivative: gradients of gradients are not supported")

    return gradients


def differentiable(op: Any, gradients: Gradients | None = None, setup: Setup | None = None) -> None:
    """Registers the gradients of an op, as `torch.library.register_autograd` does.

    Args:
        gradients: Called with the context and the gradients of the results; returns one gradient per argument. None
            for an op that is part of a backward pass: a gradient through it raises RuntimeError.
        setup: Called with the context, the arguments and the results, to save what `gradients` needs.
    """
    backward = gradients or _refused(op)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:  # type: ignore[override]
            with torch._C._AutoDispatchBelowAutograd():
                results = op(*arguments)
            if setup is not None:
                setup(ctx, arguments, results)
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return Differentiable.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    _LIBRARY.impl(op._opname, call, "Autograd")
