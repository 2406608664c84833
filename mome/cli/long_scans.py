"""Says how long a scan will take, where no progress bar can be seen, as in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable

_LONG_S = 120.0
_MEASURED_TILES = 2  # the first one takes longer


class LongScans:
    """Says it once per scan, as soon as a few tiles are done and the rest will take more than two minutes.

    Args:
        say: Prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._began = 0.0

    def progress(self, done: int, total: int) -> None:
        """Takes the number of tiles that are done, after every tile of a scan."""
        if done == 1:
            self._began = time.monotonic()
        elif done == 1 + _MEASURED_TILES:
            left_s = (time.monotonic() - self._began) / _MEASURED_TILES * (total - done)
            if left_s > _LONG_S:
                self._say(f"the network has {total - done:,} of {total:,} tiles to go, about {left_s / 60:.0f} minutes")
