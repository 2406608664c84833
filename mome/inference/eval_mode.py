"""Runs a model in evaluation mode and leaves it as it was, so that a training loop may segment between its steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import nn

_Method = TypeVar("_Method", bound=Callable[..., Any])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets a model to evaluation mode for the block; afterwards every module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def in_evaluation_mode(method: _Method) -> _Method:
    """Runs a method of an object that has a `model` with that model in evaluation mode."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with evaluating(self.model):
            return method(self, *args, **kwargs)

    return cast("_Method", run)
