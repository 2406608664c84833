"""Measures how long the network of a model computes, in whatever loop calls it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class NetworkTime:
    """Adds up the wall time of a model's `encode` and `decode`.

    Args:
        model: A MoME; its two methods are replaced by ones that measure themselves.

    Attributes:
        seconds: Time in both methods since the last `reset`.
        tiles: Calls of `encode` since then.
    """

    def __init__(self, model: Any) -> None:
        self.seconds, self.tiles = 0.0, 0
        model.encode = self._measured(model.encode, counts=True)
        model.decode = self._measured(model.decode, counts=False)

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
