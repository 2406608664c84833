"""Wall time of the phases of a segmentation."""

from __future__ import annotations

import time


class Phases:
    """Measures consecutive phases; the first one begins when the object is made.

    Attributes:
        seconds: Phase → wall time in seconds, to the millisecond. A phase that ends several times is summed.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def end(self, phase: str) -> None:
        """Adds the time since the last call to `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + now - self._began, 3)
        self._began = now

    def include(self, seconds: dict[str, float]) -> None:
        """Adds phases that were measured elsewhere; the next phase begins now."""
        for phase, value in seconds.items():
            self.seconds[phase] = round(self.seconds.get(phase, 0.0) + value, 3)
        self._began = time.perf_counter()
