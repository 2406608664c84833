"""Measures how long the network of a model computes, in whatever loop calls it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class NetworkTime:
    """Adds up the wall time of a model's `encode` and `decode`.

    Args:
        model: A MoME; it gets a subclass of its class whose two methods measure themselves. A copy of the model, as the
            segmenter makes one for bfloat16, is measured, too.

    Attributes:
        seconds: Time in both methods since the last `reset`.
        tiles: Calls of `encode` since then.
    """

    def __init__(self, model: Any) -> None:
        self.seconds, self.tiles = 0.0, 0
        kind = type(model)
        methods = {
            "encode": self._measured(kind.encode, counts=True),
            "decode": self._measured(kind.decode, counts=False),
        }
        model.__class__ = type(kind.__name__, (kind,), methods)

    def reset(self) -> None:
        """Begins again at zero."""
        self.seconds, self.tiles = 0.0, 0

    def _measured(self, method: Callable[..., Any], *, counts: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = method(*args, **kwargs)
            self.seconds += time.perf_counter() - began
            self.tiles += counts
            return result

        return call
