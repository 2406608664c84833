"""Runs a model in evaluation mode and leaves it as it was, so that a training loop may segment between its steps."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from torch import nn

_Method = TypeVar("_Method", bound=Callable[..., Any])


@dataclass
class _Use:
    """How many threads run a model in evaluation mode, and the modules that were in training mode before the first."""

    count: int = 0
    training: list[nn.Module] = field(default_factory=list)


_uses: weakref.WeakKeyDictionary[nn.Module, _Use] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets a model to evaluation mode for the block; afterwards every module has its own mode again.

    Several threads may do so at once: the last one that leaves restores the modes.
    """
    with _lock:
        use = _uses.setdefault(model, _Use())
        if not use.count:
            use.training = [module for module in model.modules() if module.training]
            model.eval()
        use.count += 1
    try:
        yield
    finally:
        with _lock:
            use.count -= 1
            if not use.count:
                for module in use.training:
                    module.training = True
                use.training = []


def in_evaluation_mode(method: _Method) -> _Method:
    """Runs a method of an object that has a `model` with that model in evaluation mode."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with evaluating(self.model):
            return method(self, *args, **kwargs)

    return cast("_Method", run)
