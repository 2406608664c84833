"""Triton's interpreter, which runs kernels on the CPU, and what it does not support."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from ..weights import ExpertWeights

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # read once, since Triton reads it when it is imported


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU (`TRITON_INTERPRET=1`, set before triton is imported)."""
    return _INTERPRETED


def through_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Computes bfloat16 inputs in float32 under the interpreter, whose bfloat16 results are wrong."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        if not (interpreting() and arguments[0].dtype == torch.bfloat16):
            return function(*arguments, **options)
        result = function(*map(_widened, arguments), **options)
        return tuple(map(_narrowed, result)) if isinstance(result, tuple) else _narrowed(result)

    return wrapped


def _widened(value: Any) -> Any:
    if isinstance(value, ExpertWeights):
        return ExpertWeights(*map(_widened, value))
    return value.float() if torch.is_tensor(value) and value.dtype == torch.bfloat16 else value


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.dtype == torch.float32 else tensor
